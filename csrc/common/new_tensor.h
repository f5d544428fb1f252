// Tensors in new memory. The stable ABI drops torch's reason for a failed allocation, so the error raised here names
// the shape.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <exception>
#include <optional>
#include <string>

namespace splade_fast {

using torch::headeronly::IntHeaderOnlyArrayRef;

template <typename Make>
torch::stable::Tensor new_or_error(IntHeaderOnlyArrayRef shape, const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {
    std::string sizes;
    for (const int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
    STD_TORCH_CHECK(false, "cannot allocate a tensor of shape (", sizes, ")");
  }
}

// An uninitialised tensor on the device of `like`, in its dtype by default.
inline torch::stable::Tensor new_tensor(const torch::stable::Tensor& like, IntHeaderOnlyArrayRef shape,
                                        std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  return new_or_error(shape, [&] { return torch::stable::new_empty(like, shape, dtype); });
}

inline torch::stable::Tensor new_zeros_tensor(const torch::stable::Tensor& like, IntHeaderOnlyArrayRef shape,
                                              std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  return new_or_error(shape, [&] { return torch::stable::new_zeros(like, shape, dtype); });
}

// A contiguous tensor is returned as it is, without a call of the dispatcher.
inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  return new_or_error(tensor.sizes(), [&] { return torch::stable::contiguous(tensor); });
}

}  // namespace splade_fast
