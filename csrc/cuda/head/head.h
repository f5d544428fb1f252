// The checked arguments and the outputs of the CUDA head.
#pragma once

#include "cuda/common.cuh"

namespace splade_fast::cuda {

struct HeadInput {
  Tensor tokens;  // contiguous (B * L, D) or (T, D)
  Tensor weight;  // contiguous (V, D)
  std::optional<Tensor> bias, mask, cu_seqlens;
  int64_t batch, length;  // length of a padded sequence

  int64_t rows() const { return tokens.size(0); }
  int64_t vocabulary() const { return weight.size(0); }
  int64_t dim() const { return weight.size(1); }
  Sequences sequences() const { return {cu_seqlens ? const_data<int32_t>(*cu_seqlens) : nullptr, length, rows()}; }
};

inline HeadInput check_input(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens) {
  const SequenceShape shape = check_sequences(hidden, mask, cu_seqlens);
  check_decoder(hidden, weight, bias);
  const int64_t rows = cu_seqlens ? hidden.size(0) : shape.batch * shape.length;
  return {torch::stable::view(as_contiguous(hidden), std::vector<int64_t>{rows, weight.size(1)}),
          as_contiguous(weight),
          contiguous_or_none(bias),
          contiguous_or_none(mask),
          contiguous_or_none(cu_seqlens),
          shape.batch,
          shape.length};
}

struct HeadOutputs {
  Tensor pooled, max_logits, argmax;
  bool saved;
};

inline HeadOutputs new_outputs(const HeadInput& input, const Tensor& hidden, Pooling pooling, bool save,
                               bool float_output) {
  const ScalarType dtype = hidden.scalar_type(), acc = accumulation_type(dtype);
  const bool saved = save && pooling == Pooling::kMax;
  const std::vector<int64_t> shape{input.batch, input.vocabulary()}, none{0};
  return {new_tensor(hidden, shape, float_output ? acc : dtype), new_tensor(hidden, saved ? shape : none, acc),
          new_tensor(hidden, saved ? shape : none, head_position_type(hidden, input.cu_seqlens)), saved};
}

}  // namespace splade_fast::cuda
