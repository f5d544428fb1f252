// What screening may take for granted: docs/screening.md derives it. Shared by both backends.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/float_bits.h"

namespace splade_fast {

// Bounds are sums of products of these upper bounds of norms, in float:
//   |h·w - m·w - a| <= residual(h) * norm(w) + norm(h) * residual(w) + kScreenTiny,
// m the mean that was taken from h, a the dot product of the rounded rows.

// Of every norm: what summing up its squares may have lost.
SPLADE_FAST_INLINE float screen_inflation(int64_t depth) {
  return 1.0f + 0x1p-10f + static_cast<float>(depth) * 0x1p-23f;
}

// Relative to norm(h) * norm(w): what the full-precision product, m·w, the rotation, and the scales may each have lost
// to rounding, in any order of summation.
SPLADE_FAST_INLINE float screen_rounding(int64_t depth) { return static_cast<float>(depth + 64) * 0x1p-23f; }

// Absolute, of both residuals and of the bound: whatever went below the smallest normal number, with or without
// flushing to zero.
constexpr float kScreenTiny = 0x1p-100f;

// Relative to |bias| + |m·w|: the rounding of their sum.
constexpr float kScreenShiftRounding = 0x1p-21f;

// Rows whose largest entry is outside are not rounded at all: their squares would leave the range of float, or those of
// what rounding takes from them.
constexpr float kScreenSmallest = 0x1p-40f, kScreenLargest = 0x1p50f;

// Absolute, of the norm of a part of a row: the squares of its entries may all have gone below the smallest number.
constexpr float kScreenTinyPart = 0x1p-58f;

// Products of int8 over more than this could leave int32.
constexpr int64_t kScreenMaxDepth = int64_t{1} << 16;

// Rows are rotated by a random sign flip and a Hadamard transform of blocks of so many entries, which spreads
// outlier dimensions and keeps every dot product.
constexpr int64_t kScreenDepthUnit = 64, kScreenMaxBlock = 1024;

// Along a balanced basis the first depths tell most of a product: after each stage but the last, the pairs are looked
// at that have not been ruled out.
constexpr int64_t kScreenStages = 3;

// A quarter, a half, and all of the depths.
inline int64_t screen_stage_end(int64_t stage, int64_t padded_depth) {
  return padded_depth >> (kScreenStages - 1 - stage);
}
inline int64_t screen_stage_begin(int64_t stage, int64_t padded_depth) {
  return stage == 0 ? 0 : screen_stage_end(stage - 1, padded_depth);
}

// Relative to the norm of a row and that of the matrix by which it is multiplied.
inline float screen_basis_rounding(int64_t depth) { return static_cast<float>(depth + 2) * 0x1p-23f; }

// At least one unit.
SPLADE_FAST_INLINE int64_t screen_padded_depth(int64_t depth) {
  const int64_t units = (depth + kScreenDepthUnit - 1) / kScreenDepthUnit;
  return (units > 1 ? units : 1) * kScreenDepthUnit;
}

// The largest power of two that divides the padded depth.
SPLADE_FAST_INLINE int64_t screen_block(int64_t padded_depth) {
  const int64_t block = padded_depth & -padded_depth;
  return block < kScreenMaxBlock ? block : kScreenMaxBlock;
}

// The sign of a dimension: a bit of a mixed counter.
SPLADE_FAST_INLINE float screen_sign(int64_t dimension) {
  uint32_t x = static_cast<uint32_t>(dimension) * 0x9e3779b9u;
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return (x >> 31) != 0 ? -1.0f : 1.0f;
}

}  // namespace splade_fast
