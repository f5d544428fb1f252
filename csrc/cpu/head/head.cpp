// head on the CPU: the ops head_forward_dense, head_backward_max and head_backward_sum. Their kernels are in
// forward.cpp, backward.cpp and common/head_sum_backward.h.
#include "cpu/head/head.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/head_sum_backward.h"
#include "cpu/memory.h"
#include "cpu/simd/kernels.h"

namespace splade_fast::cpu {

HeadInput check_head_input(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens) {
  const SequenceShape shape = check_sequences(hidden, mask, cu_seqlens);
  check_decoder(hidden, weight, bias);
  return {
      as_contiguous(hidden), as_contiguous(weight), contiguous_or_none(bias),
      cu_seqlens ? packed_sequences(*cu_seqlens, hidden.size(0)) : padded_sequences(shape.batch, shape.length, mask)};
}

HeadOutputs new_head_outputs(const Tensor& hidden, const HeadInput& input, const std::optional<Tensor>& cu_seqlens,
                             Pooling pooling, bool save, bool float_output, bool is_declined) {
  const ScalarType dtype = hidden.scalar_type(), acc = accumulation_type(dtype);
  const std::vector<int64_t> shape{input.sequences.batch(), input.vocabulary()}, empty{0};
  const std::vector<int64_t>&pooled = is_declined ? empty : shape,
        &saved = save && pooling == Pooling::kMax ? pooled : empty;
  return {new_tensor(hidden, pooled, float_output ? acc : dtype), new_tensor(hidden, saved, acc),
          new_tensor(hidden, saved, head_position_type(hidden, cu_seqlens))};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& hidden, const Tensor& weight,
                                           const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
                                           const std::optional<Tensor>& cu_seqlens, int64_t pooling_code,
                                           int64_t activation_code, bool save, bool float_output, bool /*allow_tf32*/) {
  const Pooling pooling = check_pooling(pooling_code);
  const Activation activation = check_activation(activation_code);
  const HeadInput input = check_head_input(hidden, weight, bias, mask, cu_seqlens);
  const HeadOutputs outputs = new_head_outputs(hidden, input, cu_seqlens, pooling, save, float_output);
  head_forward_dense(input, pooling, activation, outputs);
  return {outputs.pooled, outputs.max_logits, outputs.argmax};
}

HeadGradients new_gradients(const Tensor& hidden, const Tensor& weight, bool needs_hidden, bool needs_weight,
                            bool needs_bias) {
  const std::vector<int64_t> none{0}, entries{weight.size(0)};
  const auto empty = [](const Tensor& like, const torch::headeronly::IntHeaderOnlyArrayRef& shape) {
    const Tensor gradient = new_tensor(like, shape);
    prefer_huge_pages(gradient);
    return gradient;
  };
  return {needs_hidden ? empty(hidden, hidden.sizes()) : empty(hidden, none),
          needs_weight ? empty(weight, weight.sizes()) : empty(weight, none),
          needs_bias ? empty(weight, entries) : empty(weight, none)};
}

SequenceRows sequence_rows(const Tensor& hidden, const std::optional<Tensor>& cu_seqlens) {
  SequenceRows sequences;
  if (cu_seqlens) {
    const std::vector<int64_t> starts = packed_starts(*cu_seqlens, hidden.size(0));
    for (size_t b = 0; b + 1 < starts.size(); ++b) {
      sequences.start.push_back(starts[b]);
      sequences.rows.push_back(starts[b + 1] - starts[b]);
    }
  } else {
    for (int64_t b = 0; b < hidden.size(0); ++b) {
      sequences.start.push_back(b * hidden.size(1));
      sequences.rows.push_back(hidden.size(1));
    }
  }
  return sequences;
}

std::tuple<Tensor, Tensor, Tensor> backward_max(const Tensor& grad, const Tensor& max_logits, const Tensor& argmax,
                                                const Tensor& hidden, const Tensor& weight,
                                                const std::optional<Tensor>& cu_seqlens, int64_t activation_code,
                                                bool needs_hidden, bool needs_weight, bool needs_bias) {
  const Activation activation = check_activation(activation_code);
  const SequenceShape shape = check_sequences(hidden, std::nullopt, cu_seqlens);
  check_decoder(hidden, weight, std::nullopt);
  check_head_grad(grad, hidden, shape.batch, weight.size(0));
  check_saved(grad, max_logits, argmax, shape.batch, weight.size(0), head_position_type(hidden, cu_seqlens));
  const SequenceRows sequences = sequence_rows(hidden, cu_seqlens);
  const HeadGradients gradients = new_gradients(hidden, weight, needs_hidden, needs_weight, needs_bias);
  head_backward_max(as_contiguous(grad), max_logits, argmax, as_contiguous(hidden), as_contiguous(weight), sequences,
                    activation, gradients);
  return {gradients.hidden, gradients.weight, gradients.bias};
}

// The device that head_sum_backward expects.
template <typename T>
struct SumDevice {
  using Acc = Accumulator<T>;

  const Tensor& grad;  // (B, V)
  const std::optional<Tensor>& bias;
  const std::vector<int32_t>& sequence;  // (tokens,)
  Activation activation;

  void to_gradient(const Tensor& product, int64_t first_token, int64_t first_column) const {
    const int64_t columns = product.size(1), vocabulary = grad.size(1);
    torch::stable::parallel_for(0, product.size(0), 1, [&](int64_t begin, int64_t end) {
      const Scratch<Acc> logit(columns), addend(columns);
      if (bias) kernels<T>().load(addend.get(), const_data<T>(*bias) + first_column, columns);
      for (int64_t t = begin; t < end; ++t) {
        T* row = mutable_data<T>(product) + t * columns;
        kernels<T>().load(logit.get(), row, columns);
        if (bias) kernels<Acc>().axpy(logit.get(), Acc(1), addend.get(), columns);
        kernels<T>().coefficients(const_data<T>(grad) + sequence[first_token + t] * vocabulary + first_column,
                                  logit.get(), columns, activation, logit.get());
        kernels<T>().store(row, logit.get(), columns);
      }
    });
  }

  void accumulate(const Tensor& sum, const Tensor& part) const {
    constexpr int64_t kBlock = 1024;
    const bool is_wider = sum.scalar_type() != part.scalar_type();
    torch::stable::parallel_for(0, ceil_div(sum.numel(), kBlock), 16, [&](int64_t begin, int64_t end) {
      const Scratch<Acc> total(kBlock);
      for (int64_t i = begin * kBlock; i < std::min(end * kBlock, sum.numel()); i += kBlock) {
        const int64_t count = std::min(kBlock, sum.numel() - i);
        if (is_wider) {
          kernels<T>().axpy(mutable_data<Acc>(sum) + i, Acc(1), const_data<T>(part) + i, count);
          continue;
        }
        kernels<T>().load(total.get(), const_data<T>(sum) + i, count);
        kernels<T>().axpy(total.get(), Acc(1), const_data<T>(part) + i, count);
        kernels<T>().store(mutable_data<T>(sum) + i, total.get(), count);
      }
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> backward_sum(const Tensor& grad, const Tensor& hidden, const Tensor& weight,
                                                const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
                                                const std::optional<Tensor>& cu_seqlens, int64_t activation_code,
                                                bool needs_hidden, bool needs_weight, bool needs_bias) {
  constexpr int64_t kChunkBytes = int64_t{8} << 20;
  const Activation activation = check_activation(activation_code);
  const HeadInput input = check_head_input(hidden, weight, bias, mask, cu_seqlens);
  check_head_grad(grad, hidden, input.sequences.batch(), weight.size(0));
  const HeadGradients gradients = new_gradients(hidden, weight, needs_hidden, needs_weight, needs_bias);
  const Tensor dense_grad = as_contiguous(torch::stable::to(grad, hidden.scalar_type()));

  // The real tokens are gathered. Their gradients go back to their rows, and the gradient of padding is zero.
  const Sequences& sequences = input.sequences;
  const Tensor rows = torch::stable::empty(std::vector<int64_t>{sequences.tokens()}, ScalarType::Long);
  std::copy(sequences.row.begin(), sequences.row.end(), mutable_data<int64_t>(rows));
  const int64_t all_rows = cu_seqlens ? hidden.size(0) : hidden.size(0) * hidden.size(1);
  const Tensor tokens =
      aten::index_select(torch::stable::view(input.hidden, std::vector<int64_t>{all_rows, input.dim()}), 0, rows);
  SumGradients sums;
  if (needs_hidden) sums.hidden = new_tensor(tokens, tokens.sizes());
  if (needs_weight) sums.weight = gradients.weight;
  if (needs_bias) sums.bias = gradients.bias;
  dispatch_floating(hidden.scalar_type(), [&](auto type) {
    const SumDevice<typename decltype(type)::type> device{dense_grad, input.bias, sequences.sequence, activation};
    head_sum_backward(tokens, input.weight, kChunkBytes, device, sums);
  });
  if (gradients.hidden.numel() > 0) {
    std::memset(gradients.hidden.mutable_data_ptr(), 0, gradients.hidden.numel() * gradients.hidden.element_size());
    const int64_t bytes = input.dim() * static_cast<int64_t>(gradients.hidden.element_size());
    for (int64_t t = 0; t < sequences.tokens(); ++t) {
      std::memcpy(mutable_data<char>(gradients.hidden) + sequences.row[t] * bytes,
                  const_data<char>(*sums.hidden) + t * bytes, bytes);
    }
  }
  return {gradients.hidden, gradients.weight, gradients.bias};
}

}  // namespace
}  // namespace splade_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CPU, m) {
  m.impl("head_forward_dense", TORCH_BOX(&splade_fast::cpu::forward));
  m.impl("head_backward_max", TORCH_BOX(&splade_fast::cpu::backward_max));
  m.impl("head_backward_sum", TORCH_BOX(&splade_fast::cpu::backward_sum));
}
