// Blocks of tokens of the head's forward.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace splade_fast::cpu {

// A block is whole sequences, or a part of one long sequence.
struct Block {
  int64_t first, last;                   // sequences [first, last)
  int64_t begin, end;                    // tokens [begin, end)
  bool has_first_token, has_last_token;  // of its sequences
};

// offset: (B + 1,), the first token of each sequence.
inline std::vector<Block> cut_into_blocks(const std::vector<int64_t>& offset, int64_t max_tokens,
                                          int64_t max_sequences) {
  std::vector<Block> blocks;
  const int64_t batch = static_cast<int64_t>(offset.size()) - 1;
  for (int64_t first = 0; first < batch;) {
    int64_t last = first + 1;
    const int64_t begin = offset[first];
    while (last < batch && last - first < max_sequences && offset[last + 1] - begin <= max_tokens) ++last;
    const int64_t end = offset[last];
    int64_t start = begin;
    do {  // at least once, because sequences without tokens have outputs too
      const int64_t stop = std::min(start + max_tokens, end);
      blocks.push_back({first, last, start, stop, start == begin, stop == end});
      start = stop;
    } while (start < end);
    first = last;
  }
  return blocks;
}

}  // namespace splade_fast::cpu
