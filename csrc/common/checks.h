// Argument checks for both backends. Python code checks its arguments first, under the names that its caller knows; the
// checks here protect callers from C++.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "common/options.h"

namespace splade_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

inline ScalarType accumulation_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Smallest integer type that holds the positions 0 to length - 1.
inline ScalarType position_type(int64_t length) {
  if (length <= 256) return ScalarType::Byte;
  return length <= 32768 ? ScalarType::Short : ScalarType::Int;
}

inline Pooling check_pooling(int64_t pooling) {
  STD_TORCH_CHECK(pooling == 0 || pooling == 1, "pooling must be 0 (max) or 1 (sum), got ", pooling);
  return static_cast<Pooling>(pooling);
}

inline Activation check_activation(int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation must be 0, 1 or 2, got ", activation);
  return static_cast<Activation>(activation);
}

// Dtype and shape of a tensor for error messages, such as "Float (3, 4)".
inline std::string describe(const Tensor& tensor) {
  std::string text = std::string(torch::headeronly::toString(tensor.scalar_type())) + " (";
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    text += (dim > 0 ? ", " : "") + std::to_string(tensor.size(dim));
  }
  return text + ")";
}

inline void check_floating(const char* name, const Tensor& tensor, int64_t dims) {
  STD_TORCH_CHECK(is_supported(tensor.scalar_type()), name, " must be float32, float64, bfloat16 or float16, got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.dim() == dims, name, " must have ", dims, " dimensions, got ", tensor.dim());
}

inline void check_same(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, " must have the dtype of ", other_name, ", ",
                  torch::headeronly::toString(other.scalar_type()), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.device() == other.device(), name, " must be on the device of ", other_name);
}

inline void check_size(const char* name, const Tensor& tensor, int64_t dim, int64_t expected) {
  STD_TORCH_CHECK(tensor.size(dim) == expected, name, " must have size ", expected, " in dimension ", dim, ", got ",
                  tensor.size(dim));
}

inline void check_mask(const std::optional<Tensor>& mask, const Tensor& other, int64_t batch, int64_t length) {
  if (!mask) return;
  STD_TORCH_CHECK(
      mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == batch && mask->size(1) == length,
      "attention_mask must be bool (batch, length) = (", batch, ", ", length, "), got ", describe(*mask));
  STD_TORCH_CHECK(mask->device() == other.device(), "attention_mask must be on the device of the other tensors");
}

inline void check_decoder(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_floating("weight", weight, 2);
  check_same("weight", weight, "hidden", hidden);
  check_size("weight", weight, 1, hidden.size(hidden.dim() - 1));
  if (bias) {
    check_floating("bias", *bias, 1);
    check_same("bias", *bias, "hidden", hidden);
    check_size("bias", *bias, 0, weight.size(0));
  }
}

// Shape of the sequences of hidden, which is (B, L, D), or (T, D) with cu_seqlens (B + 1,).
struct SequenceShape {
  int64_t batch;
  int64_t length;  // L; for packed hidden T, an upper bound of the length of each sequence
};

inline SequenceShape check_sequences(const Tensor& hidden, const std::optional<Tensor>& mask,
                                     const std::optional<Tensor>& cu_seqlens) {
  check_floating("hidden", hidden, cu_seqlens ? 2 : 3);
  if (!cu_seqlens) {
    STD_TORCH_CHECK(hidden.size(0) <= INT32_MAX, "hidden must have at most 2^31 - 1 sequences, got ", hidden.size(0));
    check_mask(mask, hidden, hidden.size(0), hidden.size(1));
    return {hidden.size(0), hidden.size(1)};
  }
  STD_TORCH_CHECK(!mask, "attention_mask must be None with cu_seqlens");
  STD_TORCH_CHECK(cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1,
                  "cu_seqlens must be int32 (batch + 1,), got ", describe(*cu_seqlens));
  STD_TORCH_CHECK(cu_seqlens->device() == hidden.device(), "cu_seqlens must be on the device of hidden");
  return {cu_seqlens->size(0) - 1, hidden.size(0)};
}

inline void check_row_values(const std::string& prefix, const Tensor& values) {
  STD_TORCH_CHECK(is_supported(values.scalar_type()) && values.dim() == 2, prefix,
                  "values must be a matrix of float32, float64, bfloat16 or float16, got ", describe(values));
}

// Check sparse rows (rows, slots). Error messages put the prefix before the names of the three tensors.
inline void check_sparse_rows(const std::string& prefix, const Tensor& indices, const Tensor& values,
                              const Tensor& lengths, int64_t num_cols) {
  STD_TORCH_CHECK(num_cols >= 0 && num_cols < INT32_MAX, "num_cols must be a size below 2^31 - 1, got ", num_cols);
  check_row_values(prefix, values);
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Int && indices.dim() == 2 && indices.size(0) == values.size(0) &&
                      indices.size(1) == values.size(1),
                  prefix, "indices must be int32 and have the shape of ", prefix, "values, (", values.size(0), ", ",
                  values.size(1), "), got ", describe(indices));
  STD_TORCH_CHECK(lengths.scalar_type() == ScalarType::Int && lengths.dim() == 1 && lengths.size(0) == values.size(0),
                  prefix, "lengths must be int32 (", values.size(0), ",), got ", describe(lengths));
  STD_TORCH_CHECK(indices.device() == values.device() && lengths.device() == values.device(), prefix, "indices and ",
                  prefix, "lengths must be on the device of ", prefix, "values");
}

// Check the queries or documents of score: sparse rows with indices and lengths, or dense rows (rows, num_cols).
inline void check_rows(const std::string& prefix, const std::optional<Tensor>& indices, const Tensor& values,
                       const std::optional<Tensor>& lengths, int64_t num_cols) {
  STD_TORCH_CHECK(indices.has_value() == lengths.has_value(), prefix, "indices and ", prefix,
                  "lengths must both be None or neither");
  if (indices) return check_sparse_rows(prefix, *indices, values, *lengths, num_cols);
  check_row_values(prefix, values);
  STD_TORCH_CHECK(values.size(1) == num_cols, prefix, "values must be (rows, num_cols) = (", values.size(0), ", ",
                  num_cols, ") without indices, got ", values.size(1), " columns");
}

inline void check_score_inputs(const std::optional<Tensor>& query_indices, const Tensor& query_values,
                               const std::optional<Tensor>& query_lengths, const Tensor& doc_indices,
                               const Tensor& doc_values, const Tensor& doc_lengths, int64_t num_cols) {
  check_rows("query_", query_indices, query_values, query_lengths, num_cols);
  check_sparse_rows("doc_", doc_indices, doc_values, doc_lengths, num_cols);
  STD_TORCH_CHECK(query_values.device() == doc_values.device(), "doc_values must be on the device of query_values");
}

// Common dtype of two floating-point dtypes, as torch.promote_types returns it.
inline ScalarType promote_types(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Dtype of the argmax of the head. A packed sequence may have any length.
inline ScalarType head_position_type(const Tensor& hidden, const std::optional<Tensor>& cu_seqlens) {
  return cu_seqlens ? ScalarType::Int : position_type(hidden.size(1));
}

// Check the gradient of the pooled output of the head, which has the dtype of hidden or its accumulation type.
inline void check_head_grad(const Tensor& grad, const Tensor& hidden, int64_t batch, int64_t vocabulary) {
  check_floating("grad", grad, 2);
  check_size("grad", grad, 0, batch);
  check_size("grad", grad, 1, vocabulary);
  STD_TORCH_CHECK(grad.device() == hidden.device(), "grad must be on the device of hidden");
  const ScalarType dtype = hidden.scalar_type();
  STD_TORCH_CHECK(grad.scalar_type() == dtype || grad.scalar_type() == accumulation_type(dtype),
                  "grad must have the dtype of hidden or its accumulation type, got ",
                  torch::headeronly::toString(grad.scalar_type()));
}

// Check the inputs of a backward of max pooling: the gradient and what the forward saved.
inline void check_saved(const Tensor& grad, const Tensor& max_logits, const Tensor& argmax, int64_t batch,
                        int64_t vocabulary, ScalarType position) {
  check_floating("grad", grad, 2);
  STD_TORCH_CHECK(grad.size(0) == batch && grad.size(1) == vocabulary, "grad must be (batch, vocabulary) = (", batch,
                  ", ", vocabulary, "), got ", describe(grad));
  STD_TORCH_CHECK(max_logits.dim() == 2 && max_logits.size(0) == batch && max_logits.size(1) == vocabulary &&
                      max_logits.scalar_type() == accumulation_type(grad.scalar_type()),
                  "max_logits must be (batch, vocabulary) in the accumulation type, from a forward that saved it, got ",
                  describe(max_logits));
  STD_TORCH_CHECK(max_logits.is_contiguous() && argmax.is_contiguous(),
                  "max_logits and argmax must be contiguous, as the forward saved them");
  STD_TORCH_CHECK(
      argmax.dim() == 2 && argmax.size(0) == batch && argmax.size(1) == vocabulary && argmax.scalar_type() == position,
      "argmax must be (batch, vocabulary) in the position type, from a forward that saved it, got ", describe(argmax));
  STD_TORCH_CHECK(grad.device() == max_logits.device() && grad.device() == argmax.device(),
                  "grad, max_logits and argmax must be on one device");
}

}  // namespace splade_fast
