// The kernel tables of every instruction set that this machine runs.
#pragma once

#include <cstdio>

#include "cpu/kernels.h"

template <typename Body>
void for_each_instruction_set(Body body) {
  using namespace splade_fast::cpu;
  const auto run = [&](const AllKernels& kernels) {
    std::printf("%s\n", kernels.name);
    body(kernels);
  };
  run(kernels_portable());
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) run(kernels_avx2());
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) run(kernels_avx512());
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) run(kernels_avx512bf16());
#endif
}
