// cut_into_blocks() against its rules: blocks cover all tokens in order, stay within their limits, and cut only
// sequences that stand alone.
#include "cpu/head/blocks.h"
#include "expect.h"

using splade_fast::cpu::Block;
using splade_fast::cpu::cut_into_blocks;

static void check(const std::vector<int64_t>& lengths, int64_t max_tokens, int64_t max_sequences) {
  std::vector<int64_t> offset{0};
  for (const int64_t length : lengths) offset.push_back(offset.back() + length);
  int64_t next_sequence = 0, next_token = 0;
  for (const Block& block : cut_into_blocks(offset, max_tokens, max_sequences)) {
    EXPECT(block.first == next_sequence && block.begin == next_token, "blocks follow each other");
    EXPECT(block.end - block.begin <= max_tokens, "%ld tokens", static_cast<long>(block.end - block.begin));
    EXPECT(block.last - block.first <= max_sequences, "too many sequences");
    EXPECT(block.has_first_token == (block.begin == offset[block.first]), "has_first_token");
    EXPECT(block.has_last_token == (block.end == offset[block.last]), "has_last_token");
    EXPECT((block.has_first_token && block.has_last_token) || block.last == block.first + 1,
           "only a single sequence is cut");
    next_token = block.end;
    if (block.has_last_token) next_sequence = block.last;
  }
  EXPECT(next_sequence == static_cast<int64_t>(lengths.size()) && next_token == offset.back(), "all is covered");
}

int main() {
  check({}, 8, 4);
  check({0}, 8, 4);
  check({0, 0, 0, 0, 0, 0}, 8, 4);
  check({3, 5, 1, 8, 0, 2}, 8, 4);
  check({20, 1, 0, 17, 8}, 8, 4);
  check({1, 1, 1, 1, 1, 1, 1}, 8, 4);
  check({16, 0, 16}, 8, 4);
  return 0;
}
