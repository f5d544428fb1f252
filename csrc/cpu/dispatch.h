// From a tensor's dtype to the CPU element type, and typed pointers that do not know torch's own types.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/checks.h"
#include "dtypes.h"

namespace splade_fast::cpu {

template <typename T>
struct Type {
  using type = T;
};

// body(Type<T>{}) for the element type of dtype.
template <typename Body>
void dispatch_floating(ScalarType dtype, Body body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(Type<float>{});
    case ScalarType::Double:
      return body(Type<double>{});
    case ScalarType::BFloat16:
      return body(Type<bfloat16>{});
    case ScalarType::Half:
      return body(Type<float16>{});
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

}  // namespace splade_fast::cpu
