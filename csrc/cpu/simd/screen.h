// Screening: an int8 product of rounded rows that proves, with the bound of common/screen_bound.h, that most entries
// of the vocabulary are not positive and most tokens not their maximum. One table of functions per instruction set.
#pragma once

#include <array>
#include <cstdint>

#include "common/screen_bound.h"
#include "cpu/dtypes.h"

namespace splade_fast::cpu {

// Tokens are rounded and packed in groups of so many: (groups, steps, kScreenGroup) units of four int8, a step being
// four depths; or, where Screen::token_rows is set, (groups, steps / 16, kScreenGroup, 16).
constexpr int64_t kScreenGroup = 16;

// Up to `lanes` rows to rotate and to round.
template <typename T>
struct RowsToRound {
  const T* base;
  int64_t stride;
  const int64_t* row;  // (count,) rows of base; nullptr: they follow each other
  int64_t count;
  int64_t depth, padded_depth;
  float* scratch;     // 2 * padded_depth * kMaxLanes, aligned to a vector
  const float* mean;  // (depth,)
  bool subtract;      // the mean from every row (tokens); if not, also return its products with them (entries)
  // How they are rotated: by signs (padded_depth,), times the norm of the Hadamard transforms that follow; or
  // multiplied by a basis (depth, padded_depth). Neither, and no mean: they have been.
  const float *sign, *basis;
  const float* largest;  // (lanes,) entry of every row that its scale is to be made for; nullptr: its own
};

// Rows that are rotated but not rounded. The norms are upper bounds.
struct RotatedRows {
  float* rows;            // (lanes, padded_depth)
  float *largest, *norm;  // the largest entry; the norm before the rotation; both infinite if the row is not finite
  float* rest;            // norm of the depths after the first stage
};

// Rounded rows: row ≈ scale * integers. residual and norm are upper bounds of ‖row - scale * integers‖ and of the
// norms of both; they are infinite where the row is not finite.
struct RoundedRows {
  uint32_t* units;      // four integers of a lane in a unit, consecutive depths `unit_stride` units apart
  int64_t unit_stride;  // 0: sixteen consecutive units of a lane side by side, lanes below each other
  float *scale, *residual, *norm;
  float* own_norm;                             // norm before the rotation, likewise
  std::array<float*, kScreenStages - 1> rest;  // norm of the depths after a stage, likewise
  std::array<int32_t*, kScreenStages> sum;     // of the integers of a stage
  float* mean_dot;                             // products with the mean, unless subtracted
};

// What is largest among the tokens of a tile, which have one scale.
struct ScreenTile {
  float scale = 0, residual = 0, norm = 0;
  std::array<float, kScreenStages - 1> rest = {};
};

// Rounded tokens of a block of whole sequences.
struct ScreenTokens {
  const uint32_t* units;
  const float *scale, *residual, *norm;  // residual with all that rounding may add
  // Added to the sums when a stage begins: takes away the offset of the weight's bytes.
  std::array<const int32_t*, kScreenStages> start;
  const int32_t* sequence;  // (tokens,) row of the state
  int64_t steps;            // padded depth / 4
  int64_t stages;           // kScreenStages, or 1: a product in one go
  const ScreenTile* tiles;  // (tokens / tile_tokens,) of several stages
};

// A panel of rounded vocabulary entries.
struct ScreenPanel {
  const uint32_t* units;  // (steps, columns)
  const float *scale, *residual, *norm;
  const float* threshold;  // what the product must reach for a positive logit
  const float* rest;       // (stages - 1, columns) norms of the depths after a stage
};

// Products of the tokens of one sequence.
struct ScreenedSequence {
  const float* products;         // (tokens, columns)
  const float* state;            // (columns,)
  const uint8_t* settled;        // of the tiles, of which the sequence may start
  int64_t first;                 // so many tokens later
  const float *residual, *norm;  // (tokens,)
  float largest_residual, largest_norm;
  int64_t tokens;
};

// The pairs that are left: for every column that has any, its tokens, ascending.
struct ScreenedPairs {
  int32_t* columns;  // (panel_columns,)
  int32_t* counts;   // (panel_columns,)
  int32_t* tokens;   // panel_columns * tokens of the sequence
  int32_t* scratch;  // kMaxLanes * tokens of the sequence
  int64_t entries, pairs;
  int64_t compared;  // pairs that had to be looked at one by one
};

template <typename T>
struct RowFunctions {
  void (*rotate)(const RowsToRound<T>& rows, const RotatedRows& rotated);
  void (*round)(const RowsToRound<T>& rows, int64_t levels, int64_t offset, const RoundedRows& rounded);
};

struct Screen {
  const char* name;
  int64_t lanes;  // rows rounded at a time
  int64_t panel_columns;
  int64_t tile_tokens;                  // tokens that are settled together
  int64_t token_levels, weight_levels;  // integers go from -levels to levels
  int64_t weight_offset;                // the weight's bytes are that much larger
  // How much faster than the full-precision product of float32 the int8 one is: what the choice between them goes by.
  double speed;
  bool token_rows;  // the layout of the tokens, see kScreenGroup

  RowFunctions<float> f32;
  RowFunctions<double> f64;
  RowFunctions<bfloat16> bf16;
  RowFunctions<float16> f16;

  // products[token][column] = scale * integer product of tokens [begin, end), begin a multiple of kScreenGroup, and
  // state[sequence][column] the largest of the sequence's tokens; the caller initialises it. Except for the tiles that
  // are settled before the last stage, since none of their products can reach its threshold. Returns the number of
  // steps made, of all tiles.
  int64_t (*multiply)(const ScreenTokens& tokens, const ScreenPanel& panel, int64_t begin, int64_t end, float* products,
                      float* state, uint8_t* settled);

  // What of these products, of one sequence's tokens, may be a positive logit and, if only the largest is wanted, may
  // be that.
  void (*find_pairs)(const ScreenPanel& panel, const ScreenedSequence& sequence, bool largest, ScreenedPairs& found);
};

template <typename T>
const RowFunctions<T>& row_functions(const Screen& screen) {
  if constexpr (std::is_same_v<T, float>) return screen.f32;
  if constexpr (std::is_same_v<T, double>) return screen.f64;
  if constexpr (std::is_same_v<T, bfloat16>) return screen.bf16;
  if constexpr (std::is_same_v<T, float16>) return screen.f16;
}

const Screen& screen_portable();
#if defined(__x86_64__)
const Screen& screen_avx2();
const Screen& screen_avxvnni();
const Screen& screen_avx512();
const Screen& screen_avx512vnni();
const Screen& screen_amx();
#elif defined(__aarch64__)
const Screen& screen_dotprod();
#endif

// The one that goes with all_kernels().
const Screen& screen();

}  // namespace splade_fast::cpu
