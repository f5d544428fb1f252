// ATen ops that the stable headers do not wrap, called through the dispatcher. Ops with Scalar arguments (add_, addmm)
// cannot be called this way.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>
#include <vector>

#include "common/new_tensor.h"

namespace splade_fast::aten {

using torch::stable::Tensor;

template <size_t kArgs>
Tensor call(const char* op, const char* overload, std::array<StableIValue, kArgs> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// out = a @ b. The variant with an output has no autocast rule, so a backward inside autocast keeps its dtype.
inline void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  call<3>("aten::mm", "out", {from(a), from(b), from(out)});
}

// out = a @ b in the dtype of out, which may be float32 for bfloat16 and float16 operands. CUDA only.
inline void mm_out_dtype(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  call<4>("aten::mm", "dtype_out", {from(a), from(b), from(out.scalar_type()), from(out)});
}

inline Tensor mm(const Tensor& a, const Tensor& b) {
  const Tensor out = new_tensor(a, std::vector<int64_t>{a.size(0), b.size(1)});
  mm_out(out, a, b);
  return out;
}

inline Tensor index_select(const Tensor& self, int64_t dim, const Tensor& index) {
  using torch::stable::detail::from;
  return call<3>("aten::index_select", "", {from(self), from(dim), from(index)});
}

}  // namespace splade_fast::aten
