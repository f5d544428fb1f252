#include "kernels_impl.h"

namespace splade_fast::cpu {
const AllKernels& kernels_portable() {
  static constexpr AllKernels kernels = make_all_kernels("portable");
  return kernels;
}
}  // namespace splade_fast::cpu
