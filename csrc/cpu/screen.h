// Screening: an int8 product of rounded rows that proves, with the bound of common/screen_bound.h, that most entries
// of the vocabulary are not positive and most tokens not their maximum. One table of functions per instruction set.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace splade_fast::cpu {

// Tokens are rounded and packed in groups of so many: (groups, steps, kScreenGroup) units of four int8, a step being
// four depths; or, where Screen::token_rows is set, (groups, steps / 16, kScreenGroup, 16).
constexpr int64_t kScreenGroup = 16;

// Up to `lanes` rows to round.
template <typename T>
struct RowsToRound {
  const T* base;
  int64_t stride;
  const int64_t* row;  // (count,) rows of base; nullptr: they follow each other
  int64_t count;
  int64_t depth, padded_depth;
  const float* mean;  // (depth,)
  const float* sign;  // (padded_depth,) times the norm of the rotation
  bool subtract;      // the mean from every row (tokens); if not, also return its products with them (entries)
  float* scratch;     // padded_depth * kMaxLanes, aligned to a vector
};

// Rounded rows: row ≈ scale * integers. residual and norm are upper bounds of ‖row - scale * integers‖ and of the
// norms of both; they are infinite where the row is not finite.
struct RoundedRows {
  uint32_t* units;      // four integers of a lane in a unit, consecutive depths `unit_stride` units apart
  int64_t unit_stride;  // 0: sixteen consecutive units of a lane side by side, lanes below each other
  float *scale, *residual, *norm;
  int32_t* sum;     // of the integers
  float* mean_dot;  // products with the mean, unless subtracted
};

// Rounded tokens of a block of whole sequences.
struct ScreenTokens {
  const uint32_t* units;
  const float *scale, *residual, *norm;  // residual with all that rounding may add
  const int32_t* start;                  // where the product's sum starts: takes away the offset of the weight's bytes
  const int32_t* sequence;               // (tokens,) row of the state
  int64_t steps;                         // padded depth / 4
};

// A panel of rounded vocabulary entries.
struct ScreenPanel {
  const uint32_t* units;  // (steps, columns)
  const float *scale, *residual, *norm;
  const float* threshold;  // what the product must reach for a positive logit
};

// Products of the tokens of one sequence.
struct ScreenedSequence {
  const float* products;         // (tokens, columns)
  const float* state;            // (columns,)
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

struct Screen {
  const char* name;
  int64_t lanes;  // rows rounded at a time
  int64_t panel_columns;
  int64_t token_levels, weight_levels;  // integers go from -levels to levels
  int64_t weight_offset;                // the weight's bytes are that much larger
  // How much faster than the full-precision product of float32 the int8 one is: what the choice between them goes by.
  double speed;
  bool token_rows;  // the layout of the tokens, see kScreenGroup

  void (*round_f32)(const RowsToRound<float>& rows, int64_t levels, int64_t offset, const RoundedRows& rounded);
  void (*round_f64)(const RowsToRound<double>& rows, int64_t levels, int64_t offset, const RoundedRows& rounded);
  void (*round_bf16)(const RowsToRound<bfloat16>& rows, int64_t levels, int64_t offset, const RoundedRows& rounded);
  void (*round_f16)(const RowsToRound<float16>& rows, int64_t levels, int64_t offset, const RoundedRows& rounded);

  // products[token][column] = scale * integer product of tokens [begin, end), begin a multiple of kScreenGroup, and
  // state[sequence][column] the largest of the sequence's tokens; the caller initialises it.
  void (*multiply)(const ScreenTokens& tokens, const ScreenPanel& panel, int64_t begin, int64_t end, float* products,
                   float* state);

  // What of these products, of one sequence's tokens, may be a positive logit and, if only the largest is wanted, may
  // be that.
  void (*find_pairs)(const ScreenPanel& panel, const ScreenedSequence& sequence, bool largest, ScreenedPairs& found);
};

template <typename T>
auto round_rows(const Screen& screen) {
  if constexpr (std::is_same_v<T, float>) return screen.round_f32;
  if constexpr (std::is_same_v<T, double>) return screen.round_f64;
  if constexpr (std::is_same_v<T, bfloat16>) return screen.round_bf16;
  if constexpr (std::is_same_v<T, float16>) return screen.round_f16;
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
