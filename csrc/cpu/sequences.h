// Real tokens of a batch, from its attention mask or cu_seqlens. The kernels go by this list and never see padding.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"

namespace splade_fast::cpu {

struct Sequences {
  std::vector<int64_t> row;       // (tokens,) row in the flattened (B * L, ·) or packed (T, ·) input
  std::vector<int32_t> position;  // (tokens,) position within the sequence
  std::vector<int32_t> sequence;  // (tokens,) index of the sequence
  std::vector<int64_t> offset;    // (B + 1,) first token of each sequence

  int64_t batch() const { return static_cast<int64_t>(offset.size()) - 1; }
  int64_t tokens() const { return offset.back(); }
  int64_t length(int64_t b) const { return offset[b + 1] - offset[b]; }

  void append(int64_t b, int64_t l, int64_t input_row) {
    row.push_back(input_row);
    position.push_back(static_cast<int32_t>(l));
    sequence.push_back(static_cast<int32_t>(b));
  }
};

inline Sequences padded_sequences(int64_t batch, int64_t length, const std::optional<Tensor>& mask) {
  Sequences sequences;
  sequences.offset.reserve(batch + 1);
  sequences.offset.push_back(0);
  const std::optional<Tensor> dense = contiguous_or_none(mask);
  const bool* attention_mask = dense ? const_data<bool>(*dense) : nullptr;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t l = 0; l < length; ++l) {
      if (!attention_mask || attention_mask[b * length + l]) sequences.append(b, l, b * length + l);
    }
    sequences.offset.push_back(static_cast<int64_t>(sequences.row.size()));
  }
  return sequences;
}

inline std::vector<int64_t> packed_starts(const Tensor& cu_seqlens, int64_t tokens) {
  const Tensor dense = as_contiguous(cu_seqlens);
  const int32_t* starts = const_data<int32_t>(dense);
  std::vector<int64_t> bounds(starts, starts + dense.numel());
  STD_TORCH_CHECK(bounds.front() == 0 && bounds.back() == tokens && std::is_sorted(bounds.begin(), bounds.end()),
                  "cu_seqlens must rise from 0 to the ", tokens, " tokens of hidden");
  return bounds;
}

inline Sequences packed_sequences(const Tensor& cu_seqlens, int64_t tokens) {
  Sequences sequences;
  sequences.offset = packed_starts(cu_seqlens, tokens);
  for (int64_t b = 0; b < sequences.batch(); ++b) {
    for (int64_t t = sequences.offset[b]; t < sequences.offset[b + 1]; ++t) {
      sequences.append(b, t - sequences.offset[b], t);
    }
  }
  return sequences;
}

}  // namespace splade_fast::cpu
