// Chooses the kernel table for this machine, once.
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace splade_fast::cpu {
namespace {

struct Candidate {
  const char* name;
  bool runs_here;
  const AllKernels& (*kernels)();
};

const AllKernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Candidate candidates[] = {
      {"avx512bf16", avx512 && __builtin_cpu_supports("avx512bf16"), kernels_avx512bf16},
      {"avx512", avx512, kernels_avx512},
      {"avx2", avx2, kernels_avx2},
      {"portable", true, kernels_portable},
  };
#else
  const Candidate candidates[] = {{"portable", true, kernels_portable}};
#endif
  const char* wanted = std::getenv("SPLADE_FAST_ISA");
  for (const Candidate& candidate : candidates) {
    const bool chosen = wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, candidate.name) == 0;
    if (chosen && candidate.runs_here) return candidate.kernels();
  }
  STD_TORCH_CHECK(false, "SPLADE_FAST_ISA=", wanted, " is not an instruction set of this build and machine");
}

}  // namespace

const AllKernels& all_kernels() {
  static const AllKernels& kernels = choose();
  return kernels;
}

}  // namespace splade_fast::cpu

// For build_info(): read with ctypes, since an op cannot return a string through the stable ABI of torch 2.10.
extern "C" __attribute__((visibility("default"))) const char* splade_fast_cpu_instruction_set() {
  return splade_fast::cpu::all_kernels().name;
}
