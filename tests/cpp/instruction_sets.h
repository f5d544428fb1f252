// Kernel tables of all instruction sets that this machine supports. The conditions are those of instruction_set.cpp.
#pragma once

#include <cstdio>

#include "cpu/simd/kernels.h"

#if defined(__x86_64__)
inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

inline bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

template <typename Body>
void for_each_instruction_set(Body body) {
  using namespace splade_fast::cpu;
  const auto run = [&](const AllKernels& kernels) {
    std::printf("%s\n", kernels.name);
    body(kernels);
  };
  run(kernels_portable());
#if defined(__x86_64__)
  if (has_avx2()) run(kernels_avx2());
  if (has_avx512()) run(kernels_avx512());
  if (has_avx512vnni() && __builtin_cpu_supports("avx512bf16")) run(kernels_avx512bf16());
#endif
}
