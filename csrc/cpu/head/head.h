// What the files of the CPU head share: the arguments once checked, and the three kernels' host sides.
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
  int64_t depth() const { return weight.size(1); }
};

HeadInput check_head_input(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens);

struct HeadOutputs {
  Tensor pooled;
  Tensor max_logits, argmax;  // without elements: not saved
};

// Uninitialised; `none`: all without elements.
HeadOutputs new_head_outputs(const Tensor& hidden, const HeadInput& input, const std::optional<Tensor>& cu_seqlens,
                             Pooling pooling, bool save, bool float_output, bool none = false);

struct HeadGradients {
  Tensor hidden;  // without elements: not needed
  Tensor weight;
  Tensor bias;
};

void head_forward(const HeadInput& input, Pooling pooling, Activation activation, const HeadOutputs& outputs);

// (tokens,) Which run of tokens each is summed up with first by head_forward's sum pooling, if they are of one
// sequence.
std::vector<int64_t> head_runs(const HeadInput& input);

// Where each sequence lies in the flattened hidden states.
struct SequenceRows {
  std::vector<int64_t> start;  // (B,) row of position 0
  std::vector<int64_t> rows;   // (B,) number of rows, those that do not count included
};

void head_backward_max(const Tensor& grad, const Tensor& max_logits, const Tensor& argmax, const Tensor& hidden,
                       const Tensor& weight, const SequenceRows& sequences, Activation activation,
                       const HeadGradients& gradients);

}  // namespace splade_fast::cpu
