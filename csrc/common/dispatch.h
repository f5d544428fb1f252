// Dispatch from the dtype of a tensor to an element type, typed data pointers, and the layouts that the kernels need.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/checks.h"
#include "common/integers.h"
#include "common/new_tensor.h"

namespace splade_fast {

template <typename T>
struct Type {
  using type = T;
};

// Call body(Type<T>{}) with the element type T of dtype. Each backend brings its own half-precision types.
template <typename BFloat16, typename Float16, typename Body>
void dispatch_floating_as(ScalarType dtype, Body body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(Type<float>{});
    case ScalarType::Double:
      return body(Type<double>{});
    case ScalarType::BFloat16:
      return body(Type<BFloat16>{});
    case ScalarType::Half:
      return body(Type<Float16>{});
    default:
      STD_TORCH_CHECK(false, "dtype must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(dtype));
  }
}

template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() == dtype) return as_contiguous(tensor);
  Tensor converted = new_tensor(tensor, tensor.sizes(), dtype);
  torch::stable::copy_(converted, tensor);
  return converted;
}

// Kernels read rows, along the last dimension, in place. Each row must be contiguous; rows may be any stride apart.
inline Tensor contiguous_rows(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : as_contiguous(tensor);
}

// Elements from one row of a matrix to the next. A matrix without elements has a null pointer, to which nothing may be
// added.
inline int64_t row_stride(const Tensor& rows) { return rows.numel() == 0 ? 0 : rows.stride(0); }

inline std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(as_contiguous(*tensor)) : std::nullopt;
}

}  // namespace splade_fast
