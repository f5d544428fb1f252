// The test of a pair of token and vocabulary entry in the screened head. The tokens of a tile share a scale and the
// largest residual of them, so an integer threshold serves a whole tile and an entry. Plain functions for host and
// device: tests/cpp/test_screen_threshold.cpp runs them, docs/screening.md derives them.
#pragma once

#include <climits>
#include <cmath>

#include "common/screen_bound.h"

namespace splade_fast::cuda {

constexpr float kScreenLevels = 127;  // integers go from -levels to levels

// Returns the scale of a row, or of a tile of rows, with this largest entry; 0: nothing is rounded.
SPLADE_FAST_INLINE float screen_scale(float largest) { return largest / kScreenLevels; }

// Upper bounds of norms, as in common/screen_bound.h.
struct alignas(16) ScreenEntry {
  float threshold;  // lower limit, without the product of the mean, of a product with a positive logit
  float scale, norm, residual;
};

// The largest values over the tokens of a tile.
struct ScreenTile {
  float largest, norm, residual;
};

// Returns -(bias + mean·w), lowered by the possible rounding error. No product reaches a bias of -inf.
SPLADE_FAST_INLINE float screen_threshold(float bias, float mean_dot) {
  if (bias == -INFINITY) return INFINITY;
  return -(bias + mean_dot) - kScreenShiftRounding * (std::fabs(bias) + std::fabs(mean_dot));
}

// A pair of the entry and a token of the tile can have a positive logit only if its integer product is above this.
// INT_MIN: any may, INT_MAX: none can.
SPLADE_FAST_INLINE int integer_threshold(const ScreenEntry& entry, const ScreenTile& tile) {
  const float bound = tile.residual * entry.norm + (tile.norm * entry.residual + kScreenTiny);
  const float gap = entry.threshold - bound, scale = screen_scale(tile.largest) * entry.scale;
  // One side is all residual, so the integers are 0.
  if (scale == 0) return gap > 0 ? INT_MAX : INT_MIN;
  // Lowered by more than the three roundings can add.
  constexpr float kRounding = 0x1p-21f, kMost = 0x1p30f;  // no product of int8 is larger
  const float quotient = gap / scale;
  float lowered = quotient * (quotient > 0 ? 1 - kRounding : 1 + kRounding);
  if (gap < 0 && lowered > -1) lowered = -1;  // the quotient may have underflowed
  if (lowered >= kMost) return INT_MAX;
  if (!(lowered >= -kMost)) return INT_MIN;  // or NaN
  return static_cast<int>(std::floor(lowered));
}

// Returns the number of pairs beyond which the full-precision product of all pairs is faster: reading the rows of one
// pair from the second-level cache, 4 dim bytes, takes the time of some 500 pairs in that product.
SPLADE_FAST_INLINE int64_t candidate_capacity(int64_t rows, int64_t vocabulary) {
  constexpr int64_t kPairsPerCandidate = 512, kLeast = 4096;
  const int64_t share = rows * vocabulary / kPairsPerCandidate;
  return share > kLeast ? share : kLeast;
}

}  // namespace splade_fast::cuda
