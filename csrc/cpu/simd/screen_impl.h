// The kernels of screening in vector extensions, compiled once for each instruction set.
#pragma once

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#include "common/screen_bound.h"
#include "cpu/prefetch.h"
#include "cpu/simd/isa.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/screen.h"

namespace splade_fast::cpu {
namespace {

using Floats = Vec<float>;
using Ints = Mask<float>;
constexpr int kScreenLanes = kLanes<float>;

// Shape of the register tile, kScreenTokens x kScreenVectors sums. The operands take the other registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kScreenTokens = 8, kScreenVectors = 3;
#else
constexpr int kScreenTokens = 4, kScreenVectors = 2;
#endif
constexpr int64_t kScreenColumns = kScreenVectors * kScreenLanes;
static_assert(kScreenGroup % kScreenTokens == 0 && kScreenGroup % kScreenLanes == 0);
static_assert((kScreenGroup & (kScreenGroup - 1)) == 0);

// Product of four int8 of each lane -------------------------------------------------------------------------------

// multiply_add adds the products of kStepsAtOnce steps to a sum. Where the weight's bytes are unsigned, they have an
// offset.

// AMX multiplies whole tiles of signed bytes instead, see multiply() below.
#if defined(SPLADE_FAST_AMX)
constexpr int kTokenLevels = 127, kWeightLevels = 127, kWeightOffset = 0;
#elif (defined(__AVX512VNNI__) && defined(__AVX512F__)) || defined(__AVXVNNI__)
constexpr int kTokenLevels = 127, kWeightLevels = 127, kWeightOffset = 128, kStepsAtOnce = 1;
inline Ints multiply_add(Ints sum, const Ints (&weight)[1], const Ints (&token)[1]) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(weight[0]), reinterpret_cast<__m512i>(token[0])));
#else
  return reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(weight[0]), reinterpret_cast<__m256i>(token[0])));
#endif
}
#elif defined(__AVX512BW__)
// Two products are added in int16, which limits the levels of the weight.
constexpr int kTokenLevels = 127, kWeightLevels = 63, kWeightOffset = 64, kStepsAtOnce = 1;
inline Ints multiply_add(Ints sum, const Ints (&weight)[1], const Ints (&token)[1]) {
  const __m512i pairs = _mm512_maddubs_epi16(reinterpret_cast<__m512i>(weight[0]), reinterpret_cast<__m512i>(token[0]));
  return sum + reinterpret_cast<Ints>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#elif defined(__AVX2__)
// Four products are added in int16, which limits the levels of both: 4 * 127 * 63 < 2^15. The sums of two steps are
// then widened at once, which makes the product a fifth faster than sums of two products of finer tokens.
constexpr int kTokenLevels = 63, kWeightLevels = 63, kWeightOffset = 64, kStepsAtOnce = 2;
inline Ints multiply_add(Ints sum, const Ints (&weight)[2], const Ints (&token)[2]) {
  const auto pairs = [&](int i) {
    return _mm256_maddubs_epi16(reinterpret_cast<__m256i>(weight[i]), reinterpret_cast<__m256i>(token[i]));
  };
  return sum + reinterpret_cast<Ints>(_mm256_madd_epi16(_mm256_add_epi16(pairs(0), pairs(1)), _mm256_set1_epi16(1)));
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int kTokenLevels = 127, kWeightLevels = 127, kWeightOffset = 0, kStepsAtOnce = 1;
inline Ints multiply_add(Ints sum, const Ints (&weight)[1], const Ints (&token)[1]) {
  return reinterpret_cast<Ints>(vdotq_s32(reinterpret_cast<int32x4_t>(sum), reinterpret_cast<int8x16_t>(weight[0]),
                                          reinterpret_cast<int8x16_t>(token[0])));
}
#else
constexpr int kTokenLevels = 127, kWeightLevels = 127, kWeightOffset = 0, kStepsAtOnce = 1;
inline Ints multiply_add(Ints sum, const Ints (&weight)[1], const Ints (&token)[1]) {
  for (int shift = 24; shift >= 0; shift -= 8) sum += ((weight[0] << shift) >> 24) * ((token[0] << shift) >> 24);
  return sum;
}
#endif

#if defined(SPLADE_FAST_AMX)
constexpr bool kHasTokenRows = true;
constexpr int kSettledTokens = kScreenGroup;
#else
constexpr bool kHasTokenRows = false;
constexpr int kSettledTokens = kScreenTokens;
#endif

inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

// Rounding rows ---------------------------------------------------------------------------------------------------

// Load dimension d of every row into x[d], with a lane for each row. Missing rows repeat the last one.
template <typename T>
inline void load_transposed(const RowsToRound<T>& rows, Floats* x) {
  const T* row[kScreenLanes];
  for (int64_t lane = 0; lane < kScreenLanes; ++lane) {
    const int64_t i = lane < rows.count ? lane : rows.count - 1;
    row[lane] = rows.base + (rows.row ? rows.row[i] : i) * rows.stride;
  }
  int64_t d = 0;
  if constexpr (!std::is_same_v<T, double>) {
    for (; d + kScreenLanes <= rows.dim; d += kScreenLanes) {
      Floats square[kScreenLanes];
      for (int lane = 0; lane < kScreenLanes; ++lane) square[lane] = load_vec(row[lane] + d);
      transpose(square);
      for (int i = 0; i < kScreenLanes; ++i) x[d + i] = square[i];
    }
  }
  for (; d < rows.dim; ++d) {
    for (int lane = 0; lane < kScreenLanes; ++lane) x[d][lane] = static_cast<float>(to_acc(row[lane][d]));
  }
  for (; d < rows.padded_dim; ++d) x[d] = Floats{};
}

// Multiply a row by the basis. Each pass computes a few dimensions of the result.
inline void change_basis(const Floats* row, const float* basis, int64_t dim, int64_t padded_dim, Floats* result) {
  constexpr int kSums = 2 * kScreenTokens;
  for (int64_t first = 0; first < padded_dim; first += kSums) {
    Floats sum[kSums] = {};
    for (int64_t d = 0; d < dim; ++d) {
      const float* entries = basis + d * padded_dim + first;
      for (int i = 0; i < kSums; ++i) sum[i] += row[d] * entries[i];
    }
    for (int i = 0; i < kSums; ++i) result[first + i] = sum[i];
  }
}

// Hadamard transform of each block of vectors, not normalised. Passes are radix 4, and a last one is radix 2 if needed.
inline void hadamard(Floats* x, int64_t count, int64_t block) {
  int64_t half = 1;
  for (; half * 4 <= block; half *= 4) {
    for (int64_t first = 0; first < count; first += 4 * half) {
      for (int64_t i = first; i < first + half; ++i) {
        const Floats a = x[i] + x[i + half], b = x[i] - x[i + half];
        const Floats c = x[i + 2 * half] + x[i + 3 * half], d = x[i + 2 * half] - x[i + 3 * half];
        x[i] = a + c;
        x[i + half] = b + d;
        x[i + 2 * half] = a - c;
        x[i + 3 * half] = b - d;
      }
    }
  }
  if (half == block) return;
  for (int64_t first = 0; first < count; first += 2 * half) {
    for (int64_t i = first; i < first + half; ++i) {
      const Floats a = x[i], b = x[i + half];
      x[i] = a + b;
      x[i + half] = a - b;
    }
  }
}

// The larger of a and b; b if either is NaN.
inline Floats max_or_second(Floats a, Floats b) { return a > b ? a : b; }

inline Floats root(Floats x) {
  for (int lane = 0; lane < kScreenLanes; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
}

// Rows that are rotated or multiplied by the basis, with a lane for each row.
template <typename T>
struct Rotated {
  Floats* x;                               // dimensions, in the scratch memory of the rows
  Floats mean_dot = {}, own_squares = {};  // product with the mean, and sum of squares before the rotation

  explicit Rotated(const RowsToRound<T>& rows) : x(reinterpret_cast<Floats*>(rows.scratch)) {
    load_transposed(rows, x);
    for (int64_t d = 0; d < rows.dim && rows.mean; ++d) {
      if (rows.should_subtract_mean) {
        x[d] -= rows.mean[d];
      } else {
        mean_dot += rows.mean[d] * x[d];
      }
    }
    for (int64_t d = 0; d < rows.dim; ++d) own_squares += x[d] * x[d];
    if (rows.basis) {
      change_basis(x, rows.basis, rows.dim, rows.padded_dim, x + rows.padded_dim);
      x += rows.padded_dim;
    } else if (rows.sign) {
      for (int64_t d = 0; d < rows.padded_dim; ++d) x[d] *= rows.sign[d];
      hadamard(x, rows.padded_dim, screen_block(rows.padded_dim));
    }
  }
};

// Largest entry of rotated rows, and the sum of their squares: of all dimensions, and of those after each stage.
struct Extent {
  Floats largest = {}, squares = {}, rest[kScreenStages];

  Extent(const Floats* x, int64_t dim) {
    for (int64_t stage = kScreenStages - 1; stage >= 0; --stage) {
      rest[stage] = squares;
      for (int64_t d = screen_stage_begin(stage, dim); d < screen_stage_end(stage, dim); ++d) {
        largest = max_or_second(x[d] < 0 ? -x[d] : x[d], largest);
        squares += x[d] * x[d];
      }
    }
  }

  Ints finite(Floats own_squares) const {
    return (squares == squares) & (largest <= kScreenLargest) & (own_squares <= kScreenLargest * kScreenLargest);
  }
};

// Upper bound of a norm, infinite for rows that are not finite.
inline Floats norm_bound(Floats squares, int64_t dim, Ints finite) {
  const Floats norm = root(squares) * screen_inflation(dim) + kScreenTinyPart;
  return finite ? norm : broadcast<Floats>(__builtin_inff());
}

template <typename T>
void rotate_rows(const RowsToRound<T>& rows, const RotatedRows& rotated) {
  const Rotated<T> found(rows);
  const int64_t dim = rows.padded_dim;
  const Extent extent(found.x, dim);
  const Ints finite = extent.finite(found.own_squares);
  store_bits(rotated.largest, finite ? extent.largest : broadcast<Floats>(__builtin_inff()));
  store_bits(rotated.norm, norm_bound(found.own_squares, dim, finite));
  store_bits(rotated.rest, norm_bound(extent.rest[0], dim, finite));
  for (int64_t d = 0; d < dim; d += kScreenLanes) {
    Floats square[kScreenLanes];
    for (int lane = 0; lane < kScreenLanes; ++lane) square[lane] = found.x[d + lane];
    transpose(square);
    for (int lane = 0; lane < kScreenLanes; ++lane) store_bits(rotated.rows + lane * dim + d, square[lane]);
  }
}

template <typename T>
void round_rows(const RowsToRound<T>& rows, int64_t levels, int64_t offset, const RoundedRows& rounded) {
  const Rotated<T> found(rows);
  const Floats* const x = found.x;
  const int64_t dim = rows.padded_dim;
  const Extent extent(x, dim);
  const Ints finite = extent.finite(found.own_squares), rounds = finite & (extent.largest >= kScreenSmallest);
  const Floats largest = rows.largest ? load_vec(rows.largest) : extent.largest;
  const Floats scale = rounds ? largest / static_cast<float>(levels) : Floats{};
  const Floats inverse = rounds ? static_cast<float>(levels) / largest : Floats{};

  // Adding 1.5 * 2^23 rounds to the nearest integer, which then stands in the lowest bits.
  const Floats magic = broadcast<Floats>(0x1.8p23f);
  Floats lost_squares = {};
  Ints sum = {}, side_by_side[kScreenLanes];
  int64_t stage = 0;
  for (int64_t d = 0; d < dim; d += 4) {
    if (d == screen_stage_end(stage, dim)) {
      store_bits(rounded.sum[stage++], sum);
      sum = Ints{};
    }
    Ints unit = {};
    for (int i = 0; i < 4; ++i) {
      const Floats entry = rounds ? x[d + i] : Floats{};
      const Floats shifted = entry * inverse + magic;
      const Floats lost = entry - scale * (shifted - magic);
      const Ints integer = reinterpret_cast<Ints>(shifted) - reinterpret_cast<Ints>(magic);
      lost_squares += lost * lost;
      sum += integer;
      unit |= ((integer + static_cast<int32_t>(offset)) & 0xff) << (8 * i);
    }
    const int64_t step = d / 4;
    if (rounded.unit_stride > 0) {
      store_bits(rounded.units + step * rounded.unit_stride, unit);
      continue;
    }
    side_by_side[step % kScreenLanes] = unit;
    if (step % kScreenLanes < kScreenLanes - 1) continue;
    transpose(side_by_side);
    uint32_t* target = rounded.units + (step + 1 - kScreenLanes) * kScreenLanes;
    for (int lane = 0; lane < kScreenLanes; ++lane) store_bits(target + lane * kScreenLanes, side_by_side[lane]);
  }
  // A row that is not rounded is its own residual. Its norm is bounded by its largest entry, or infinite.
  const float inflation = screen_inflation(dim);
  const Floats whole =
      finite ? extent.largest * std::sqrt(static_cast<float>(dim)) : broadcast<Floats>(__builtin_inff());
  const Floats residual = (rounds ? root(lost_squares) : whole) * inflation;
  const Floats norm = (rounds ? root(extent.squares) : whole) * inflation + residual;
  store_bits(rounded.scale, scale);
  store_bits(rounded.residual, residual);
  store_bits(rounded.norm, norm);
  store_bits(rounded.sum[stage], sum);
  store_bits(rounded.own_norm, norm_bound(found.own_squares, dim, finite));
  for (size_t i = 0; i < rounded.rest.size(); ++i) {
    store_bits(rounded.rest[i], rounds ? norm_bound(extent.rest[i], dim, finite) : whole * inflation);
  }
  if (!rows.should_subtract_mean) store_bits(rounded.mean_dot, found.mean_dot);
}

// Products ----------------------------------------------------------------------------------------------------------

// Scale the integer products of tokens [first, last), and update the maximum of each sequence.
inline void store_products(const ScreenTokens& tokens, int64_t first, int64_t last, const Ints (*sum)[kScreenVectors],
                           float* products, float* state) {
  for (int64_t run = first, run_end = first; run < last; run = run_end) {
    const int32_t sequence = tokens.sequence[run];
    while (run_end < last && tokens.sequence[run_end] == sequence) ++run_end;
    for (int j = 0; j < kScreenVectors; ++j) {
      float* largest = state + sequence * kScreenColumns + j * kScreenLanes;
      float* target = products + (run - first) * kScreenColumns + j * kScreenLanes;
      Floats value = load_bits<Floats>(largest);
      for (int64_t t = run; t < run_end; ++t, target += kScreenColumns) {
        const Floats product = to_floats(sum[t - first][j]) * tokens.scale[t];
        store_bits(target, product);
        value = max_or_second(product, value);
      }
      store_bits(largest, value);
    }
  }
}

inline Floats error_bound(Floats residual, Floats norm, Floats other_residual, Floats other_norm) {
  return residual * other_norm + (norm * other_residual + kScreenTiny);
}

// Return an integer whose bit i says whether lane i is not below the limit. Infinite and NaN bounds are not below.
inline unsigned lanes_not_below(Floats x, Floats limit) { return lane_bits<float>(~(x < limit)); }

// Prefetch what a stage of the next panel reads.
inline void prefetch_stage(const ScreenPanel& panel, int64_t begin, int64_t end) {
  const uint32_t* next = panel.units + panel.next_units + begin * kScreenColumns;
  prefetch_lines(next, (end - begin) * kScreenColumns * static_cast<int64_t>(sizeof(uint32_t)));
}

#if defined(SPLADE_FAST_AMX)
// Multiply each group of tokens by a panel, in three tiles of 16 x 16 sums and steps of 64 dimensions. There are no
// stages, because here comparing products costs more than making them.
int64_t multiply(const ScreenTokens& tokens, const ScreenPanel& panel, int64_t begin, int64_t end, float* products,
                 float* state, uint8_t* settled) {
  static_assert(kScreenGroup == 16 && kScreenLanes == 16 && kScreenVectors == 3);
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
  constexpr int64_t kTile = 256;  // units
  const int64_t groups = (end - begin + kScreenGroup - 1) / kScreenGroup;
  std::memset(settled, 0, groups);
  for (int64_t first = begin; first < end; first += kScreenGroup, products += kScreenGroup * kScreenColumns) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    const uint32_t* token = tokens.units + first * tokens.steps;
    const uint32_t* weight = panel.units;
    if (first == begin) prefetch_stage(panel, 0, tokens.steps);
    for (int64_t step = 0; step < tokens.steps; step += 16, token += kTile, weight += 16 * kScreenColumns) {
      _tile_loadd(3, token, 64);
      _tile_loadd(4, weight, kScreenColumns * 4);
      _tile_loadd(5, weight + 16, kScreenColumns * 4);
      _tile_loadd(6, weight + 32, kScreenColumns * 4);
      _tile_dpbssd(0, 3, 4);
      _tile_dpbssd(1, 3, 5);
      _tile_dpbssd(2, 3, 6);
    }
    Ints sum[kScreenGroup][kScreenVectors];
    _tile_stored(0, &sum[0][0], sizeof(sum[0]));
    _tile_stored(1, &sum[0][1], sizeof(sum[0]));
    _tile_stored(2, &sum[0][2], sizeof(sum[0]));
    store_products(tokens, first, first + kScreenGroup < end ? first + kScreenGroup : end, sum, products, state);
  }
  _tile_release();
  return groups * tokens.steps;
}
#else
// Integer products of a tile so far, in registers.
using TileSums = Ints[kScreenTokens][kScreenVectors];

// Whether a product of the tile can still reach its threshold, given the sums up to the end of a stage. The rest of a
// product is at most the product of the norms of the dimensions after the stage.
inline bool has_open_product(const ScreenTokens& tokens, const ScreenPanel& panel, int64_t first, int64_t stage,
                             const TileSums& sum) {
  Ints largest[kScreenVectors];
  for (int j = 0; j < kScreenVectors; ++j) {
    largest[j] = sum[0][j];
    for (int t = 1; t < kScreenTokens; ++t) largest[j] = sum[t][j] > largest[j] ? sum[t][j] : largest[j];
  }
  const ScreenTile& tile = tokens.tiles[static_cast<uint64_t>(first) / kScreenTokens];
  unsigned open = 0;
  for (int j = 0; j < kScreenVectors; ++j) {
    const int64_t column = j * kScreenLanes;
    const Floats error = error_bound(broadcast<Floats>(tile.residual), broadcast<Floats>(tile.norm),
                                     load_vec(panel.residual + column), load_vec(panel.norm + column));
    const Floats rest = load_vec(panel.rest + stage * kScreenColumns + column) * tile.rest[stage];
    const Floats product = to_floats(largest[j]) * (load_vec(panel.scale + column) * tile.scale);
    open |= lanes_not_below(product + rest + error, load_vec(panel.threshold + column));
  }
  return open != 0;
}

// Add the products of a stage to the sums of the tile of tokens [first, first + kScreenTokens). A stage has a multiple
// of 4 steps.
inline void multiply_stage(const ScreenTokens& tokens, const ScreenPanel& panel, int64_t first, int64_t stage,
                           int64_t begin, int64_t end, TileSums& sum) {
  for (int t = 0; t < kScreenTokens; ++t) {
    for (int j = 0; j < kScreenVectors; ++j) sum[t][j] += tokens.correction[stage][first + t];
  }
  const int64_t lane = first & (kScreenGroup - 1);
  const uint32_t* token = tokens.units + (first - lane) * tokens.steps + lane + begin * kScreenGroup;
  const uint32_t* weight = panel.units + begin * kScreenColumns;
  for (int64_t step = begin; step < end; step += kStepsAtOnce, token += kStepsAtOnce * kScreenGroup) {
    Ints entries[kScreenVectors][kStepsAtOnce];
    for (int i = 0; i < kStepsAtOnce; ++i, weight += kScreenColumns) {
      for (int j = 0; j < kScreenVectors; ++j) entries[j][i] = load_bits<Ints>(weight + j * kScreenLanes);
    }
    for (int t = 0; t < kScreenTokens; ++t) {
      Ints units[kStepsAtOnce];
      for (int i = 0; i < kStepsAtOnce; ++i) {
        units[i] = broadcast<Ints>(static_cast<int32_t>(token[i * kScreenGroup + t]));
      }
      for (int j = 0; j < kScreenVectors; ++j) sum[t][j] = multiply_add(sum[t][j], entries[j], units);
    }
  }
}

inline void load_sums(const float* source, TileSums& sum) {
  for (int t = 0; t < kScreenTokens; ++t) {
    for (int j = 0; j < kScreenVectors; ++j) {
      sum[t][j] = load_bits<Ints>(source + (t * kScreenVectors + j) * kScreenLanes);
    }
  }
}
inline void store_sums(float* target, const TileSums& sum) {
  for (int t = 0; t < kScreenTokens; ++t) {
    for (int j = 0; j < kScreenVectors; ++j) store_bits(target + (t * kScreenVectors + j) * kScreenLanes, sum[t][j]);
  }
}

// store_products for a tile of one sequence, with the sums in registers.
inline void store_tile(const ScreenTokens& tokens, int64_t first, const TileSums& sum, float* products, float* state) {
  for (int j = 0; j < kScreenVectors; ++j) {
    Floats value = load_bits<Floats>(state + j * kScreenLanes);
    for (int t = 0; t < kScreenTokens; ++t) {
      const Floats product = to_floats(sum[t][j]) * tokens.scale[first + t];
      store_bits(products + t * kScreenColumns + j * kScreenLanes, product);
      value = max_or_second(product, value);
    }
    store_bits(state + j * kScreenLanes, value);
  }
}

// A stage is made for many tiles before the next one, and leaves a list of those that are still open. Whether a tile is
// open cannot be predicted, and nothing branches on it. Between stages the sums stand where the products will.
int64_t multiply(const ScreenTokens& tokens, const ScreenPanel& panel, int64_t begin, int64_t end, float* products,
                 float* state, uint8_t* settled) {
  constexpr int64_t kTilesAtOnce = 64, kTileProducts = kScreenTokens * kScreenColumns;
  int64_t steps = 0;
  for (; begin < end; begin += kTilesAtOnce * kScreenTokens) {
    const int64_t left = (end - begin + kScreenTokens - 1) / kScreenTokens;
    const int64_t tiles = left < kTilesAtOnce ? left : kTilesAtOnce;
    int32_t open[kTilesAtOnce];
    int64_t count = tiles, step = 0;
    for (int64_t i = 0; i < tiles; ++i) open[i] = static_cast<int32_t>(i);
    const int64_t last_stage = tokens.stages - 1;
    for (int64_t stage = 0; stage < last_stage; ++stage) {
      const int64_t stage_end = screen_stage_end(stage, tokens.steps);
      steps += count * (stage_end - step);
      int64_t still_open = 0;
      if (count > 0) prefetch_stage(panel, step, stage_end);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t first = begin + open[i] * kScreenTokens;
        float* const target = products + open[i] * kTileProducts;
        TileSums sum = {};
        if (stage > 0) load_sums(target, sum);
        multiply_stage(tokens, panel, first, stage, step, stage_end, sum);
        store_sums(target, sum);
        open[still_open] = open[i];
        still_open += has_open_product(tokens, panel, first, stage, sum);
      }
      count = still_open;
      step = stage_end;
    }
    std::memset(settled, 1, tiles);
    if (count > 0) prefetch_stage(panel, step, tokens.steps);
    steps += count * (tokens.steps - step);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = begin + open[i] * kScreenTokens;
      const int64_t last = first + kScreenTokens < end ? first + kScreenTokens : end;
      float* const target = products + open[i] * kTileProducts;
      TileSums sum = {}, sums;
      if (last_stage > 0) load_sums(target, sum);
      multiply_stage(tokens, panel, first, last_stage, step, tokens.steps, sum);
      settled[open[i]] = 0;
      if (last - first == kScreenTokens && tokens.sequence[first] == tokens.sequence[last - 1]) {
        store_tile(tokens, first, sum, target, state + tokens.sequence[first] * kScreenColumns);
        continue;
      }
      // A copy, so that the sums themselves need no memory.
      for (int t = 0; t < kScreenTokens; ++t) {
        for (int j = 0; j < kScreenVectors; ++j) sums[t][j] = sum[t][j];
      }
      store_products(tokens, first, last, sums, target, state);
    }
    products += tiles * kTileProducts;
    settled += tiles;
  }
  return steps;
}
#endif

void find_pairs(const ScreenPanel& panel, const ScreenedSequence& sequence, bool is_max_pooling, ScreenedPairs& found) {
  found.entries = found.pairs = 0;
  for (int64_t column = 0; column < kScreenColumns; column += kScreenLanes) {
    const Floats scale = load_vec(panel.scale + column), threshold = load_vec(panel.threshold + column);
    const Floats residual = load_vec(panel.residual + column), norm = load_vec(panel.norm + column);
    const auto error = [&](float token_residual, float token_norm) {
      return error_bound(broadcast<Floats>(token_residual), broadcast<Floats>(token_norm), residual, norm);
    };
    // The largest bound of all tokens rules out nearly all entries.
    const Floats largest =
        load_vec(sequence.state + column) * scale + error(sequence.largest_residual, sequence.largest_norm);
    const unsigned open = lanes_not_below(largest, threshold);
    if (open == 0) continue;
    const auto is_settled = [&](int64_t t) { return sequence.settled[(sequence.first + t) / kSettledTokens] != 0; };
    const float* products = sequence.products + column;
    Floats limit = threshold;
    for (int64_t t = 0; t < sequence.tokens && is_max_pooling; ++t) {
      if (is_settled(t)) continue;
      const Floats lower =
          load_vec(products + t * kScreenColumns) * scale - error(sequence.residual[t], sequence.norm[t]);
      limit = max_or_second(lower, limit);
    }
    int32_t counts[kScreenLanes] = {};
    for (int64_t t = 0; t < sequence.tokens; ++t) {
      if (is_settled(t)) continue;
      found.compared += kScreenLanes;
      const Floats upper =
          load_vec(products + t * kScreenColumns) * scale + error(sequence.residual[t], sequence.norm[t]);
      for (unsigned lanes = lanes_not_below(upper, limit) & open; lanes != 0; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        found.scratch[lane * sequence.tokens + counts[lane]++] = static_cast<int32_t>(t);
      }
    }
    for (int lane = 0; lane < kScreenLanes; ++lane) {
      if (counts[lane] == 0) continue;
      found.columns[found.entries] = static_cast<int32_t>(column) + lane;
      found.counts[found.entries++] = counts[lane];
      std::memcpy(found.tokens + found.pairs, found.scratch + lane * sequence.tokens, counts[lane] * sizeof(int32_t));
      found.pairs += counts[lane];
    }
  }
}

constexpr Screen make_screen(const char* name, double speed) {
  return {name,
          kScreenLanes,
          kScreenColumns,
          kSettledTokens,
          kTokenLevels,
          kWeightLevels,
          kWeightOffset,
          speed,
          kHasTokenRows,
          {rotate_rows<float>, round_rows<float>},
          {rotate_rows<double>, round_rows<double>},
          {rotate_rows<bfloat16>, round_rows<bfloat16>},
          {rotate_rows<float16>, round_rows<float16>},
          multiply,
          find_pairs};
}

}  // namespace
}  // namespace splade_fast::cpu
