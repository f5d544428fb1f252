// Rows rounded to int8 for the screened head: entries of the vocabulary with a scale each, tokens with a scale for
// every tile of the product. docs/screening.md explains the facts kept of each. Raw pointers of one device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/head/sm90/pack.h"
#include "cuda/head/sm90/screen_threshold.h"

namespace splade_fast::cuda {

// Rows (…, dim) of bfloat16 or float16; dim is a multiple of 8, the address a multiple of 16.
struct RowsToRound {
  const void* rows;
  bool is_bfloat16;
  int64_t dim;
  const float* mean;  // (dim,)
};

// Facts of every row of the weight, float (kWeightFacts, vocabulary). kWeightSample is one of its elements, which shows
// whether the weight has changed.
enum WeightFact { kWeightScale, kWeightResidual, kWeightNorm, kWeightMeanDot, kWeightSample, kWeightFacts };

// Returns the dimension of the sample, another one in every row.
SPLADE_FAST_INLINE int64_t sampled_dim(int64_t entry, int64_t dim) {
  constexpr int64_t kStep = 7919;  // a prime number
  return entry * kStep % dim;
}

struct WeightToRound {
  RowsToRound weight;
  int64_t vocabulary;
  int8_t* integers;  // (vocabulary, screen_padded_dim(dim))
  float* facts;      // (kWeightFacts, vocabulary)
};

cudaError_t launch_round_weight(const WeightToRound& task, int64_t multiprocessors, cudaStream_t stream);

// The entries of a call, with its bias: work of the launch that rounds the tokens.
struct EntriesToDescribe {
  const void* weight;  // (vocabulary, dim), of the type of the tokens
  const void* bias;    // (vocabulary,), or null
  const float* facts;  // (kWeightFacts, vocabulary)
  int64_t vocabulary;
  ScreenEntry* entries;  // (vocabulary,)
  // A weight that differs from the rounded one raises the count of candidates to too_many.
  unsigned long long *count, too_many;
};

// Packed tokens.
struct TokensToRound {
  RowsToRound tokens;
  int64_t room;          // number of rows in memory
  const int32_t* count;  // number of tokens, on the device
  int tile_tokens;
  // (room, screen_padded_dim(dim)). The rows of tokens are written, then zeros to the end of the last tile, since the
  // product reads whole tiles.
  int8_t* integers;
  float* largest;     // (room,), of tokens: the largest entry of a rotated row, inf if it is not finite
  ScreenTile* tiles;  // (tiles,), zero before the launch that rounds
};

// Two launches: one packs the tokens and finds the largest entry of each, the other rounds them.
cudaError_t launch_round_tokens(const PackTask& pack, const TokensToRound& task, const EntriesToDescribe& entries,
                                int64_t multiprocessors, cudaStream_t stream);

}  // namespace splade_fast::cuda
