#include "kernels_impl.h"

namespace splade_fast::cpu {
const AllKernels& kernels_avx2() {
  static constexpr AllKernels kernels = make_all_kernels("avx2");
  return kernels;
}
}  // namespace splade_fast::cpu
