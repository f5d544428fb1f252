// Backward of the head with sum pooling, for both backends. Every position has a gradient, so the logits are recomputed
// in chunks, and two more products per chunk give the gradients. torch computes the products.
//   G = grad * activation'(H W^T + bias),  grad_hidden = G W,  grad_weight = G^T H,  grad_bias = sum of G's rows
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/checks.h"
#include "common/torch_ops.h"

namespace splade_fast {

// The gradients that are needed, to be filled.
struct SumGradients {
  std::optional<Tensor> hidden;  // (T, D) like the tokens
  std::optional<Tensor> weight;
  std::optional<Tensor> bias;
};

// Size of a chunk of logits: at most max_bytes, and as square as the vocabulary allows.
struct SumChunks {
  int64_t tokens, columns;
};

inline SumChunks choose_sum_chunks(int64_t tokens, int64_t vocabulary, int64_t element_bytes, int64_t max_bytes) {
  constexpr int64_t kMaxTokens = 4096;
  const int64_t chunk_tokens = std::max<int64_t>(std::min(tokens, kMaxTokens), 1);
  const int64_t columns = max_bytes / (chunk_tokens * element_bytes);
  return {chunk_tokens, std::max<int64_t>(std::min(columns, vocabulary), 1)};
}

// tokens: (T, D). Each backend passes a device with two functions:
//   device.to_gradient(product, first_token, first_column) replaces a chunk of H W^T, without bias, by G;
//   device.accumulate(sum, part) adds part to sum, whose dtype is that of part or its accumulation type.
template <typename Device>
void head_sum_backward(const Tensor& tokens, const Tensor& weight, int64_t max_chunk_bytes, const Device& device,
                       const SumGradients& gradients) {
  const int64_t num_tokens = tokens.size(0), vocabulary = weight.size(0), dim = weight.size(1);
  const ScalarType acc = accumulation_type(weight.scalar_type());
  const SumChunks chunks = choose_sum_chunks(num_tokens, vocabulary, weight.element_size(), max_chunk_bytes);
  for (const auto& gradient : {gradients.weight, gradients.bias}) {
    if (gradient) {
      Tensor target = *gradient;
      torch::stable::zero_(target);
    }
  }
  for (int64_t token = 0; token < num_tokens; token += chunks.tokens) {
    const int64_t count = std::min(chunks.tokens, num_tokens - token);
    Tensor chunk = tokens;
    chunk = torch::stable::narrow(chunk, 0, token, count);
    std::optional<Tensor> hidden_sum;
    if (gradients.hidden) {
      hidden_sum = new_zeros_tensor(tokens, std::vector<int64_t>{count, dim}, acc);
    }
    for (int64_t column = 0; column < vocabulary; column += chunks.columns) {
      const int64_t columns = std::min(chunks.columns, vocabulary - column);
      const auto slice = [&](const Tensor& whole) {
        Tensor source = whole;
        return torch::stable::narrow(source, 0, column, columns);
      };
      const Tensor entries = slice(weight);
      const Tensor gradient = aten::mm(chunk, torch::stable::transpose(entries, 0, 1));
      device.to_gradient(gradient, token, column);
      if (hidden_sum) device.accumulate(*hidden_sum, aten::mm(gradient, entries));
      if (gradients.weight) {
        device.accumulate(slice(*gradients.weight), aten::mm(torch::stable::transpose(gradient, 0, 1), chunk));
      }
      if (gradients.bias) {
        device.accumulate(slice(*gradients.bias), torch::stable::sum(gradient, std::vector<int64_t>{0}));
      }
    }
    if (hidden_sum) {
      Tensor target = *gradients.hidden;
      target = torch::stable::narrow(target, 0, token, count);
      torch::stable::copy_(target, *hidden_sum);
    }
  }
}

}  // namespace splade_fast
