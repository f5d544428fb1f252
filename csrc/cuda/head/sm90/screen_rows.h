// Rows rounded to int8 for the screened head: entries of the vocabulary with a scale each, tokens with a scale for
// every tile of the product. docs/screening.md says what of them is kept, and why. Raw pointers of one device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/head/sm90/screen_threshold.h"

namespace splade_fast::cuda {

// Rows (…, depth) of bfloat16 or float16, depth a multiple of 8, at an address that is one of 16.
struct RowsToRound {
  const void* rows;
  bool is_bfloat16;
  int64_t depth;
  const float* mean;  // (depth,)
};

// What is kept of every row of the weight, float (kWeightFacts, vocabulary); kSample: one of its elements, to see
// whether the weight has changed.
enum WeightFact { kWeightScale, kWeightResidual, kWeightNorm, kWeightMeanDot, kWeightSample, kWeightFacts };

// Which element is the sample: another one in every row.
SPLADE_FAST_INLINE int64_t sampled_depth(int64_t entry, int64_t depth) {
  constexpr int64_t kStep = 7919;  // a prime number
  return entry * kStep % depth;
}

struct WeightToRound {
  RowsToRound weight;
  int64_t vocabulary;
  int8_t* integers;  // (vocabulary, screen_padded_dim(depth))
  float* facts;      // (kWeightFacts, vocabulary)
};

cudaError_t launch_round_weight(const WeightToRound& task, int64_t multiprocessors, cudaStream_t stream);

struct TokensToRound {
  RowsToRound tokens;
  int64_t room;          // rows that there is memory for
  const int32_t* count;  // of the tokens, on the device
  int tile_tokens;
  int8_t* integers;   // (room, screen_padded_dim(depth)), of which the tokens' rows are written
  float* largest;     // (room,), likewise: the largest entry of a row once rotated, inf if it is not finite
  ScreenTile* tiles;  // (tiles,), zero before the launch
};

cudaError_t launch_round_tokens(const TokensToRound& task, int64_t multiprocessors, cudaStream_t stream);

}  // namespace splade_fast::cuda
