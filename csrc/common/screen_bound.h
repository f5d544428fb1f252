// Error bounds and layout of the int8 product that screens the head's logits, for host and device. docs/screening.md
// derives the bounds.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/float_bits.h"

namespace splade_fast {

// For a hidden state h, a row w of the weight, the mean m that is subtracted from h, and the product a of the rounded
// rows:
//   |h·w - m·w - a| <= residual(h) * norm(w) + norm(h) * residual(w) + kScreenTiny
// norm(x) and residual(x) are upper bounds, in float, of the norm of a row and of the norm of its rounding error.

// Factor of every norm. It covers the rounding of the sum of squares.
SPLADE_FAST_INLINE float screen_inflation(int64_t dim) { return 1.0f + 0x1p-10f + static_cast<float>(dim) * 0x1p-23f; }

// Rounding error of the full-precision product, of m·w, of the rotation and of the scales, in any order of summation,
// relative to norm(h) * norm(w).
SPLADE_FAST_INLINE float screen_rounding(int64_t dim) { return static_cast<float>(dim + 64) * 0x1p-23f; }

// Absolute error that underflow may add to a residual or to the bound, with or without flushing to zero.
constexpr float kScreenTiny = 0x1p-100f;

// Rounding error of bias + m·w, relative to |bias| + |m·w|.
constexpr float kScreenShiftRounding = 0x1p-21f;

// Range of the largest entry of a row that is rounded. Outside, the squares of the row or of its rounding error leave
// the range of float.
constexpr float kScreenSmallest = 0x1p-40f, kScreenLargest = 0x1p50f;

// Absolute error of the norm of a part of a row, whose squares may all underflow.
constexpr float kScreenTinyPart = 0x1p-58f;

// Largest dim whose int8 products fit into int32.
constexpr int64_t kScreenMaxDim = int64_t{1} << 16;

// Rows are padded to a multiple of kScreenDimUnit. A random sign flip and a Hadamard transform of blocks of at most
// kScreenMaxBlock entries rotate them, which spreads outlier dimensions and keeps every dot product.
constexpr int64_t kScreenDimUnit = 64, kScreenMaxBlock = 1024;

// Along a balanced basis the first dimensions carry most of a product. The product is therefore made in stages, and
// after each stage but the last a tile is dropped if none of its products can still reach its threshold.
constexpr int64_t kScreenStages = 3;

// Stages end after a quarter, a half, and all of the dimensions.
inline int64_t screen_stage_end(int64_t stage, int64_t padded_dim) { return padded_dim >> (kScreenStages - 1 - stage); }
inline int64_t screen_stage_begin(int64_t stage, int64_t padded_dim) {
  return stage == 0 ? 0 : screen_stage_end(stage - 1, padded_dim);
}

// Rounding error of a row times a basis matrix, relative to the product of their norms.
inline float screen_basis_rounding(int64_t dim) { return static_cast<float>(dim + 2) * 0x1p-23f; }

SPLADE_FAST_INLINE int64_t screen_padded_dim(int64_t dim) {
  const int64_t units = (dim + kScreenDimUnit - 1) / kScreenDimUnit;
  return (units > 1 ? units : 1) * kScreenDimUnit;  // at least one unit
}

// Entries of a block of the Hadamard transform: the largest power of two that divides padded_dim.
SPLADE_FAST_INLINE int64_t screen_block(int64_t padded_dim) {
  const int64_t block = padded_dim & -padded_dim;
  return block < kScreenMaxBlock ? block : kScreenMaxBlock;
}

// Random sign of a dimension: the top bit of a hash of its number.
SPLADE_FAST_INLINE float screen_sign(int64_t dimension) {
  uint32_t x = static_cast<uint32_t>(dimension) * 0x9e3779b9u;
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return (x >> 31) != 0 ? -1.0f : 1.0f;
}

}  // namespace splade_fast
