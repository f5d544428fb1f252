// Finds the accumulators of a thread that exceed the threshold of their entry. Plain functions for host and device:
// tests/cpp/test_screen_threshold.cpp runs them.
#pragma once

#include "cuda/head/sm90/tiles.h"

namespace splade_fast::cuda::sm90 {

// A pair of a packed token and a vocabulary entry that may have a positive logit.
struct CandidatePair {
  int32_t row, entry;
};

// A bit for each of the 64 columns of a thread: bit i of word w is column own_column(thread, 32 w + i).
constexpr int kWords = kAccumulators / 2 / 32;

SPLADE_FAST_INLINE constexpr int own_column(int thread, int i) { return thread % 4 * 2 + i / 2 * 8 + i % 2; }

// Returns the number of columns of a thread below `end`.
SPLADE_FAST_INLINE constexpr int own_columns_below(int thread, int end) {
  const int rest = end - thread % 4 * 2;
  return rest <= 0 ? 0 : rest / 8 * 2 + (rest % 8 < 2 ? rest % 8 : 2);
}

SPLADE_FAST_INLINE int32_t own_accumulator(const int32_t (&accumulators)[kAccumulators], int half, int i) {
  return accumulators[i / 2 * 4 + 2 * half + i % 2];
}

SPLADE_FAST_INLINE bool any_above(const int32_t (&accumulators)[kAccumulators], const int (&threshold)[2]) {
  int32_t largest[2] = {INT32_MIN, INT32_MIN};
  SPLADE_FAST_UNROLL
  for (int i = 0; i < kAccumulators / 2; ++i) {
    SPLADE_FAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int32_t one = own_accumulator(accumulators, half, i);
      largest[half] = one > largest[half] ? one : largest[half];
    }
  }
  return largest[0] > threshold[0] || largest[1] > threshold[1];
}

// Sets the bits of the columns below `end` whose accumulator exceeds the threshold.
SPLADE_FAST_INLINE void find_above(const int32_t (&accumulators)[kAccumulators], const int (&threshold)[2], int thread,
                                   int end, uint32_t (&words)[2][kWords]) {
  const int columns = own_columns_below(thread, end);
  SPLADE_FAST_UNROLL
  for (int half = 0; half < 2; ++half) {
    SPLADE_FAST_UNROLL
    for (int w = 0; w < kWords; ++w) {
      uint32_t word = 0;
      SPLADE_FAST_UNROLL
      for (int bit = 0; bit < 32; ++bit) {
        if (own_accumulator(accumulators, half, 32 * w + bit) > threshold[half]) word |= 1u << bit;
      }
      const int inside = columns - 32 * w;
      words[half][w] = inside >= 32 ? word : inside <= 0 ? 0 : word & ((1u << inside) - 1);
    }
  }
}

}  // namespace splade_fast::cuda::sm90
