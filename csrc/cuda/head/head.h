// What the files of the CUDA head share: the arguments once checked.
#pragma once

#include "cuda/common.cuh"

namespace splade_fast::cuda {

struct HeadInput {
  Tensor tokens;  // contiguous (B * L, D) or (T, D)
  Tensor weight;  // contiguous (V, D)
  std::optional<Tensor> bias, mask, cu_seqlens;
  int64_t batch, length;  // length: padded

  int64_t rows() const { return tokens.size(0); }
  int64_t vocabulary() const { return weight.size(0); }
  int64_t depth() const { return weight.size(1); }
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

}  // namespace splade_fast::cuda
