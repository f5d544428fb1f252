#include "kernels_impl.h"

namespace splade_fast::cpu {
const AllKernels& kernels_avx512() {
  static constexpr AllKernels kernels = make_all_kernels("avx512");
  return kernels;
}
}  // namespace splade_fast::cpu
