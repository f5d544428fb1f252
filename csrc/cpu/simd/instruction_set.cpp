// Choice of the instruction set, and thus of the kernel tables, for this machine.
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

#include "cpu/simd/index.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/screen.h"

namespace splade_fast::cpu {
namespace {

#if defined(__x86_64__)
// Whether the processor has tiles and their int8 products (leaf 7 of cpuid), and the system lets this process use them.
bool has_amx_int8() {
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
  bool is_supported;
  const AllKernels& (*kernels)();
  const Screen& (*screen)();
  const IndexKernels& (*index)();
};

// Return the best set that this machine supports, or the one that SPLADE_FAST_ISA names.
InstructionSet choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_avx512vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
  const InstructionSet sets[] = {
      {"amx", has_avx512vnni && __builtin_cpu_supports("avx512bf16") && has_amx_int8(), kernels_avx512bf16, screen_amx,
       index_avx512},
      {"avx512bf16", has_avx512vnni && __builtin_cpu_supports("avx512bf16"), kernels_avx512bf16, screen_avx512vnni,
       index_avx512},
      {"avx512vnni", has_avx512vnni, kernels_avx512, screen_avx512vnni, index_avx512},
      {"avx512", has_avx512, kernels_avx512, screen_avx512, index_avx512},
      {"avxvnni", has_avx2 && __builtin_cpu_supports("avxvnni"), kernels_avx2, screen_avxvnni, index_avx2},
      {"avx2", has_avx2, kernels_avx2, screen_avx2, index_avx2},
      {"portable", true, kernels_portable, screen_portable, index_portable},
  };
#elif defined(__aarch64__)
  const InstructionSet sets[] = {
      {"dotprod", (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0, kernels_portable, screen_dotprod, index_portable},
      {"portable", true, kernels_portable, screen_portable, index_portable},
  };
#else
  const InstructionSet sets[] = {{"portable", true, kernels_portable, screen_portable, index_portable}};
#endif
  const char* wanted = std::getenv("SPLADE_FAST_ISA");
  for (const InstructionSet& set : sets) {
    const bool is_wanted = wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, set.name) == 0;
    if (is_wanted && set.is_supported) return set;
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

const IndexKernels& index_kernels() {
  static const IndexKernels& kernels = chosen().index();
  return kernels;
}

}  // namespace splade_fast::cpu

// Name of the instruction set, for build_info(). Python calls this through ctypes, because an op cannot return a string
// through the stable ABI of torch 2.10. A C function must not throw, so null stands for an invalid SPLADE_FAST_ISA; the
// first op raises the error.
extern "C" __attribute__((visibility("default"))) const char* splade_fast_cpu_instruction_set() {
  try {
    return splade_fast::cpu::chosen().name;
  } catch (const std::exception&) {
    return nullptr;
  }
}
