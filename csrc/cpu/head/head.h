// Structures that the files of the CPU head share, and the functions behind its ops.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/sequences.h"

namespace splade_fast::cpu {

struct HeadInput {
  Tensor hidden;  // contiguous (B, L, D) or (T, D)
  Tensor weight;  // contiguous (V, D)
  std::optional<Tensor> bias;
  Sequences sequences;

  int64_t vocabulary() const { return weight.size(0); }
  int64_t dim() const { return weight.size(1); }
};

HeadInput check_head_input(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens);

struct HeadOutputs {
  Tensor pooled;
  Tensor max_logits, argmax;  // without elements if they are not saved
};

// Return uninitialised outputs; if the op has declined, all are without elements.
HeadOutputs new_head_outputs(const Tensor& hidden, const HeadInput& input, const std::optional<Tensor>& cu_seqlens,
                             Pooling pooling, bool save, bool float_output, bool is_declined = false);

struct HeadGradients {
  Tensor hidden, weight, bias;  // without elements if they are not needed
};

void head_forward_dense(const HeadInput& input, Pooling pooling, Activation activation, const HeadOutputs& outputs);

// Return the run (tokens,) of each token. Sum pooling in head_forward_dense adds up the tokens of a sequence that
// belong to one run before it adds up the runs.
std::vector<int64_t> find_sum_runs(const HeadInput& input);

// Rows of each sequence in the flattened hidden states, padding included.
struct SequenceRows {
  std::vector<int64_t> start;  // (B,) row of position 0
  std::vector<int64_t> rows;   // (B,) number of rows
};

void head_backward_max(const Tensor& grad, const Tensor& max_logits, const Tensor& argmax, const Tensor& hidden,
                       const Tensor& weight, const SequenceRows& sequences, Activation activation,
                       const HeadGradients& gradients);

}  // namespace splade_fast::cpu
