// Tables of the kernels of screening, one for each instruction set. An int8 product of rounded rows and the bound of
// common/screen_bound.h prove that most logits are not positive and that most tokens are not the maximum of an entry.
#pragma once

#include <array>
#include <cstdint>

#include "common/screen_bound.h"
#include "cpu/simd/dtypes.h"

namespace splade_fast::cpu {

// Tokens of a group. Groups of rounded tokens are packed as (groups, steps, kScreenGroup) units of four int8, where a
// step is four dimensions, or as (groups, steps / 16, kScreenGroup, 16) if Screen::has_token_rows.
constexpr int64_t kScreenGroup = 16;

// Up to `lanes` rows to rotate and to round.
template <typename T>
struct RowsToRound {
  const T* base;
  int64_t stride;
  const int64_t* row;  // (count,) rows of base, or nullptr for neighbouring rows
  int64_t count;
  int64_t dim, padded_dim;
  float* scratch;             // 2 * padded_dim * kMaxLanes, aligned to a vector
  const float* mean;          // (dim,)
  bool should_subtract_mean;  // from tokens; rows of the weight are multiplied by the mean instead
  // A rotation by signs (padded_dim,), scaled so that the Hadamard transform that follows keeps norms, or a basis
  // (dim, padded_dim). Both and the mean are nullptr for rows that are rotated already.
  const float *sign, *basis;
  const float* largest;  // (lanes,) entry that the scale of a row is made for, or nullptr for its own largest entry
};

// Rotated rows. The norms are upper bounds.
struct RotatedRows {
  float* rows;     // (lanes, padded_dim)
  float* largest;  // largest entry, infinite if the row is not finite
  float* norm;     // norm before the rotation, infinite if the row is not finite
  float* rest;     // norm of the dimensions after the first stage
};

// Rounded rows, row ≈ scale * integers. The norms are upper bounds, and infinite if the row is not finite.
struct RoundedRows {
  uint32_t* units;  // four integers of a lane in each unit
  // Distance of the units of consecutive steps. With 0, sixteen consecutive units of a lane are neighbours, followed by
  // those of the next lane.
  int64_t unit_stride;
  float* scale;
  float* residual;                             // norm of row - scale * integers
  float* norm;                                 // norm of row and of scale * integers
  float* own_norm;                             // norm before the rotation
  std::array<float*, kScreenStages - 1> rest;  // norm of the dimensions after a stage
  std::array<int32_t*, kScreenStages> sum;     // sum of the integers of a stage
  float* mean_dot;                             // product with the mean, unless the mean is subtracted
};

// Largest values among the tokens of a tile, which have one scale.
struct ScreenTile {
  float scale = 0, residual = 0, norm = 0;
  std::array<float, kScreenStages - 1> rest = {};
};

// Rounded tokens of a block of whole sequences.
struct ScreenTokens {
  const uint32_t* units;
  const float *scale, *residual, *norm;  // residual includes all rounding errors
  // Correction for the offset of the weight's bytes, added to the sums when a stage begins.
  std::array<const int32_t*, kScreenStages> correction;
  const int32_t* sequence;  // (tokens,) row of the state
  int64_t steps;            // padded_dim / 4
  int64_t stages;           // kScreenStages, or 1 for a product without stages
  const ScreenTile* tiles;  // (tokens / tile_tokens,), for several stages only
};

// A panel of rounded vocabulary entries.
struct ScreenPanel {
  const uint32_t* units;  // (steps, columns)
  const float *scale, *residual, *norm;
  const float* threshold;  // (columns,) a smaller product cannot give a positive logit
  const float* rest;       // (stages - 1, columns) norms of the dimensions after a stage
  // Distance to the units of a panel to prefetch. A few tokens are multiplied faster than the processor fetches what it
  // can foresee, and a stage that is made for this panel is likely to be made for the next.
  int64_t next_units;
};

// Products of the tokens of one sequence.
struct ScreenedSequence {
  const float* products;         // (tokens, columns)
  const float* state;            // (columns,)
  const uint8_t* settled;        // whether each tile is settled
  int64_t first;                 // first token of the sequence, counted from the first tile
  const float *residual, *norm;  // (tokens,)
  float largest_residual, largest_norm;
  int64_t tokens;
};

// Pairs of token and vocabulary entry that are not ruled out: the columns that have any, and their tokens in ascending
// order.
struct ScreenedPairs {
  int32_t* columns;  // (panel_columns,)
  int32_t* counts;   // (panel_columns,) number of tokens of each column
  int32_t* tokens;   // panel_columns * tokens of the sequence
  int32_t* scratch;  // kMaxLanes * tokens of the sequence
  int64_t entries, pairs;
  int64_t compared;  // number of pairs whose bounds were compared one by one
};

template <typename T>
struct RowFunctions {
  void (*rotate)(const RowsToRound<T>& rows, const RotatedRows& rotated);
  void (*round)(const RowsToRound<T>& rows, int64_t levels, int64_t offset, const RoundedRows& rounded);
};

struct Screen {
  const char* name;
  int64_t lanes;  // rows that are rounded together
  int64_t panel_columns;
  int64_t tile_tokens;                  // tokens that are settled together
  int64_t token_levels, weight_levels;  // integers lie between -levels and levels
  int64_t weight_offset;                // added to the integers of the weight, which are stored as unsigned bytes
  double speed;  // of the int8 product, relative to the float32 product; the choice between dense and screened uses it
  bool has_token_rows;  // layout of the tokens, see kScreenGroup

  RowFunctions<float> f32;
  RowFunctions<double> f64;
  RowFunctions<bfloat16> bf16;
  RowFunctions<float16> f16;

  // Compute products[token][column] = scale * integer product of tokens [begin, end), where begin is a multiple of
  // kScreenGroup, and state[sequence][column], their maximum over each sequence, which the caller initialises. A tile
  // is settled before the last stage, and left out, if none of its products can reach its threshold. Return the number
  // of steps of all tiles that were made.
  int64_t (*multiply)(const ScreenTokens& tokens, const ScreenPanel& panel, int64_t begin, int64_t end, float* products,
                      float* state, uint8_t* settled);

  // Find the products of a sequence that may be positive logits and, with `is_max_pooling`, may be the maximum.
  void (*find_pairs)(const ScreenPanel& panel, const ScreenedSequence& sequence, bool is_max_pooling,
                     ScreenedPairs& found);
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

// Table of the instruction set that instruction_set.cpp has chosen.
const Screen& screen();

}  // namespace splade_fast::cpu
