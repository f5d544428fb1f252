// Chooses the kernel tables for this machine, once.
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#if defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/simd/kernels.h"
#include "cpu/simd/screen.h"

namespace splade_fast::cpu {
namespace {

#if defined(__x86_64__)
// Tiles and their int8 products (leaf 7 of cpuid), and the system's leave for this process to use their registers.
bool amx_int8_runs() {
  unsigned a = 0, b = 0, c = 0, features = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &features)) return false;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  if ((features & kTile) == 0 || (features & kInt8) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct InstructionSet {
  const char* name;
  bool runs_here;
  const AllKernels& (*kernels)();
  const Screen& (*screen)();
};

InstructionSet choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const InstructionSet candidates[] = {
      {"amx", avx512vnni && __builtin_cpu_supports("avx512bf16") && amx_int8_runs(), kernels_avx512bf16, screen_amx},
      {"avx512bf16", avx512vnni && __builtin_cpu_supports("avx512bf16"), kernels_avx512bf16, screen_avx512vnni},
      {"avx512vnni", avx512vnni, kernels_avx512, screen_avx512vnni},
      {"avx512", avx512, kernels_avx512, screen_avx512},
      {"avxvnni", avx2 && __builtin_cpu_supports("avxvnni"), kernels_avx2, screen_avxvnni},
      {"avx2", avx2, kernels_avx2, screen_avx2},
      {"portable", true, kernels_portable, screen_portable},
  };
#elif defined(__aarch64__)
  const InstructionSet candidates[] = {
      {"dotprod", (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0, kernels_portable, screen_dotprod},
      {"portable", true, kernels_portable, screen_portable},
  };
#else
  const InstructionSet candidates[] = {{"portable", true, kernels_portable, screen_portable}};
#endif
  const char* wanted = std::getenv("SPLADE_FAST_ISA");
  for (const InstructionSet& candidate : candidates) {
    const bool chosen = wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, candidate.name) == 0;
    if (chosen && candidate.runs_here) return candidate;
  }
  STD_TORCH_CHECK(false, "SPLADE_FAST_ISA=", wanted, " is not an instruction set of this build and machine");
}

const InstructionSet& chosen() {
  static const InstructionSet set = choose();
  return set;
}

}  // namespace

const AllKernels& all_kernels() {
  static const AllKernels& kernels = chosen().kernels();
  return kernels;
}

const Screen& screen() {
  static const Screen& kernels = chosen().screen();
  return kernels;
}

}  // namespace splade_fast::cpu

// For build_info(): read with ctypes, since an op cannot return a string through the stable ABI of torch 2.10. Null
// where SPLADE_FAST_ISA names none: what C calls must not throw, and the first op says it.
extern "C" __attribute__((visibility("default"))) const char* splade_fast_cpu_instruction_set() {
  try {
    return splade_fast::cpu::chosen().name;
  } catch (const std::exception&) {
    return nullptr;
  }
}
