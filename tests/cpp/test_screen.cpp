// The screening kernels of all instruction sets that this machine supports. Their bounds hold for products in double
// precision, and no pair is left out that may be positive and, for max pooling, the maximum.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "common/screen_bound.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/screen.h"
#include "expect.h"
#include "instruction_sets.h"

namespace splade_fast::cpu {
const Screen& screen_amx_emulated();  // screen_amx_emulated.cpp
}

using namespace splade_fast;
using namespace splade_fast::cpu;

static const float kInf = std::numeric_limits<float>::infinity();

// Rows as the kernels round them.
struct Rounded {
  int64_t rows, padded_rows, padded_dim;
  std::vector<uint32_t> units;
  std::vector<float> scale, residual, norm, own_norm, mean_dot;
  std::array<std::vector<float>, kScreenStages - 1> rest;
  std::array<std::vector<int32_t>, kScreenStages> sum;
};

static std::vector<float> signs(int64_t padded_dim) {
  std::vector<float> sign(padded_dim);
  for (int64_t d = 0; d < padded_dim; ++d) {
    sign[d] = screen_sign(d) / std::sqrt(static_cast<float>(screen_block(padded_dim)));
  }
  return sign;
}

// A basis that changes no row.
static std::vector<float> identity(int64_t dim) {
  std::vector<float> basis(dim * screen_padded_dim(dim));
  for (int64_t d = 0; d < dim; ++d) basis[d * screen_padded_dim(dim) + d] = 1;
  return basis;
}

// Round tokens in groups of kScreenGroup, and rows of the weight in panels. With a basis, the tokens of a tile share a
// scale.
static Rounded round(const Screen& screen, const std::vector<float>& matrix, int64_t rows, int64_t dim,
                     const std::vector<float>& mean, bool tokens, bool along_basis = false) {
  const int64_t stride = tokens ? kScreenGroup : screen.panel_columns, padded_dim = screen_padded_dim(dim);
  const int64_t padded = (rows + stride - 1) / stride * stride;
  Rounded result;
  result.rows = rows;
  result.padded_rows = padded;
  result.padded_dim = padded_dim;
  result.units.resize(padded * padded_dim / 4);
  for (auto* facts : {&result.scale, &result.residual, &result.norm, &result.own_norm, &result.mean_dot,
                      &result.rest[0], &result.rest[1]}) {
    facts->resize(padded);
  }
  for (auto& sum : result.sum) sum.resize(padded);
  const std::vector<float> sign = signs(padded_dim), basis = identity(dim);
  std::vector<float> largest(padded);
  std::vector<float> scratch(2 * padded_dim * kMaxLanes + 16), rotated(padded_dim * kMaxLanes);
  float* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) & ~uintptr_t{63});
  const auto given = [&](int64_t row, const float* row_largest) {
    const int64_t first = std::min(row, rows - 1);
    return RowsToRound<float>{matrix.data() + first * dim,
                              dim,
                              nullptr,
                              rows - first,
                              dim,
                              padded_dim,
                              aligned,
                              mean.data(),
                              tokens,
                              along_basis ? nullptr : sign.data(),
                              along_basis ? basis.data() : nullptr,
                              row_largest};
  };
  for (int64_t row = 0; row < padded; row += screen.lanes) {
    float norm[kMaxLanes], rest[kMaxLanes];
    screen.f32.rotate(given(row, nullptr), {rotated.data(), largest.data() + row, norm, rest});
  }
  for (int64_t row = 0; row < padded; row += screen.tile_tokens) {
    std::fill_n(largest.begin() + row, screen.tile_tokens,
                *std::max_element(largest.begin() + row, largest.begin() + row + screen.tile_tokens));
  }
  for (int64_t row = 0; row < padded; row += screen.lanes) {
    screen.f32.round(given(row, along_basis && tokens ? largest.data() + row : nullptr),
                     tokens ? screen.token_levels : screen.weight_levels, tokens ? 0 : screen.weight_offset,
                     {result.units.data() + row / stride * stride * padded_dim / 4 + row % stride,
                      tokens && screen.has_token_rows ? 0 : stride,
                      result.scale.data() + row,
                      result.residual.data() + row,
                      result.norm.data() + row,
                      result.own_norm.data() + row,
                      {result.rest[0].data() + row, result.rest[1].data() + row},
                      {result.sum[0].data() + row, result.sum[1].data() + row, result.sum[2].data() + row},
                      result.mean_dot.data() + row});
  }
  return result;
}

struct Case {
  int64_t tokens, entries, dim;
  std::vector<float> hidden, weight, mean, threshold;
};

static Case make_case(int64_t tokens, int64_t entries, int64_t dim, float spread) {
  std::mt19937 random(static_cast<unsigned>(tokens * 7919 + entries * 31 + dim));
  std::normal_distribution<float> normal;
  Case found{tokens,
             entries,
             dim,
             std::vector<float>(tokens * dim),
             std::vector<float>(entries * dim),
             std::vector<float>(dim),
             std::vector<float>(entries)};
  for (float& x : found.mean) x = normal(random);
  for (int64_t i = 0; i < tokens * dim; ++i) {
    // The first dimensions carry most of a product.
    const float share = i % dim < dim / 4 + 1 ? 1.0f : 0.1f;
    found.hidden[i] = found.mean[i % dim] + normal(random) * share * (i % dim == 3 ? spread : 1.0f);
  }
  for (float& x : found.weight) x = normal(random);
  // No product reaches the thresholds from entry 48 on.
  for (int64_t v = 0; v < entries; ++v) {
    const float times = v < 48 ? std::abs(normal(random)) : 5 * spread;
    found.threshold[v] = times * std::sqrt(static_cast<float>(dim));
  }
  return found;
}

// (h - mean)·w in double precision.
static double product(const Case& inputs, int64_t token, int64_t entry) {
  double sum = 0;
  for (int64_t d = 0; d < inputs.dim; ++d) {
    sum += (static_cast<double>(inputs.hidden[token * inputs.dim + d]) - inputs.mean[d]) *
           inputs.weight[entry * inputs.dim + d];
  }
  return sum;
}

// Return the number of tiles that were settled before the last stage.
static int64_t test_screen(const Screen& screen, const Case& inputs, bool largest, bool along_basis) {
  const int64_t columns = screen.panel_columns, tokens = inputs.tokens;
  const Rounded token = round(screen, inputs.hidden, tokens, inputs.dim, inputs.mean, true, along_basis);
  const Rounded entry = round(screen, inputs.weight, inputs.entries, inputs.dim, inputs.mean, false, along_basis);
  const int64_t steps = token.padded_dim / 4;
  std::array<std::vector<int32_t>, kScreenStages> correction;
  std::vector<int32_t> sequence(tokens);
  std::vector<float> residual = token.residual, norm = token.norm, entry_residual = entry.residual;
  std::vector<ScreenTile> tiles(token.padded_rows / screen.tile_tokens);
  for (int64_t t = 0; t < token.padded_rows; ++t) {
    for (int64_t stage = 0; stage < kScreenStages; ++stage) {
      correction[stage].push_back(-static_cast<int32_t>(screen.weight_offset) * token.sum[stage][t]);
      if (!along_basis && stage > 0) correction[0][t] += correction[stage][t];
    }
    residual[t] += screen_rounding(inputs.dim) * norm[t] + kScreenTiny;
    if (along_basis) norm[t] = std::max(norm[t], token.own_norm[t]);
    ScreenTile& tile = tiles[t / screen.tile_tokens];
    tile.scale = std::max(tile.scale, token.scale[t]);
    tile.residual = std::max(tile.residual, residual[t]);
    tile.norm = std::max(tile.norm, norm[t]);
    for (int64_t stage = 0; stage < kScreenStages - 1; ++stage) {
      tile.rest[stage] = std::max(tile.rest[stage], token.rest[stage][t]);
    }
  }
  for (int64_t v = 0; v < entry.padded_rows && along_basis; ++v) {
    entry_residual[v] += screen_rounding(inputs.dim) * entry.own_norm[v];
  }
  // There are three sequences, and the second starts within a tile.
  const int64_t bounds[] = {0, tokens / 3, tokens / 3 + (tokens + 2) / 3, tokens};
  for (int64_t s = 0; s < 3; ++s) std::fill(sequence.begin() + bounds[s], sequence.begin() + bounds[s + 1], s);
  const ScreenTokens packed{token.units.data(),
                            token.scale.data(),
                            residual.data(),
                            norm.data(),
                            {correction[0].data(), correction[1].data(), correction[2].data()},
                            sequence.data(),
                            steps,
                            along_basis ? kScreenStages : 1,
                            tiles.data()};
  std::vector<float> threshold(entry.padded_rows, kInf);
  std::copy(inputs.threshold.begin(), inputs.threshold.end(), threshold.begin());

  int64_t early = 0;
  for (int64_t first = 0; first < inputs.entries; first += columns) {
    std::vector<float> rest(entry.rest[0].begin() + first, entry.rest[0].begin() + first + columns);
    rest.insert(rest.end(), entry.rest[1].begin() + first, entry.rest[1].begin() + first + columns);
    const ScreenPanel panel{entry.units.data() + first * steps,
                            entry.scale.data() + first,
                            entry_residual.data() + first,
                            entry.norm.data() + first,
                            threshold.data() + first,
                            rest.data(),
                            0};
    std::vector<float> products((tokens + 2 * kScreenGroup) * columns), state(3 * columns, -kInf);
    std::vector<uint8_t> settled(tokens / screen.tile_tokens + 2, 2);
    const int64_t made = screen.multiply(packed, panel, 0, tokens, products.data(), state.data(), settled.data());
    const int64_t used = (tokens + screen.tile_tokens - 1) / screen.tile_tokens;
    const int64_t settled_here = std::count(settled.begin(), settled.begin() + used, 1);
    EXPECT(settled[used] == 2 && (made < used * steps) == (settled_here > 0), "%ld steps of %ld tiles",
           static_cast<long>(made), static_cast<long>(used));
    early += settled_here;
    for (int64_t s = 0; s < 3; ++s) {
      const int64_t begin = bounds[s], count = bounds[s + 1] - begin;
      if (count == 0) continue;
      std::vector<int32_t> found_columns(columns), counts(columns), found_tokens(columns * count),
          scratch(kMaxLanes * count);
      ScreenedPairs found{found_columns.data(), counts.data(), found_tokens.data(), scratch.data(), 0, 0, 0};
      screen.find_pairs(panel,
                        {products.data() + begin * columns, state.data() + s * columns, settled.data(), begin,
                         residual.data() + begin, norm.data() + begin,
                         *std::max_element(residual.begin() + begin, residual.begin() + begin + count),
                         *std::max_element(norm.begin() + begin, norm.begin() + begin + count), count},
                        largest, found);
      std::vector<std::vector<bool>> kept(columns, std::vector<bool>(count, false));
      const int32_t* next = found_tokens.data();
      for (int64_t e = 0; e < found.entries; ++e) {
        EXPECT(std::is_sorted(next, next + counts[e]), "tokens ascend");
        for (int64_t i = 0; i < counts[e]; ++i) kept[found_columns[e]][*next++] = true;
      }
      EXPECT(next - found_tokens.data() == found.pairs, "%ld pairs", static_cast<long>(found.pairs));
      for (int64_t column = 0; column < columns && first + column < inputs.entries; ++column) {
        std::vector<double> exact(count);
        float most = -kInf;
        for (int64_t t = 0; t < count; ++t) {
          exact[t] = product(inputs, begin + t, first + column);
          if (settled[(begin + t) / screen.tile_tokens] != 0) continue;
          const float rounded = products[(begin + t) * columns + column] * entry.scale[first + column];
          const double bound = residual[begin + t] * entry.norm[first + column] +
                               norm[begin + t] * entry_residual[first + column] + kScreenTiny;
          EXPECT(std::abs(rounded - exact[t]) <= bound, "%g is not within %g of %g", rounded, bound, exact[t]);
          most = std::max(most, products[(begin + t) * columns + column]);
        }
        EXPECT(state[s * columns + column] == most, "state %g, not %g", state[s * columns + column], most);
        const double best = *std::max_element(exact.begin(), exact.end());
        for (int64_t t = 0; t < count; ++t) {
          const bool needed = exact[t] > threshold[first + column] && (!largest || exact[t] == best);
          EXPECT(!needed || kept[column][t], "token %ld of entry %ld is lost", static_cast<long>(t),
                 static_cast<long>(first + column));
        }
      }
    }
  }
  return early;
}

// Products that the first stage computes completely. One entry of each panel is just above its threshold, so that only
// the bounds of rounding keep it.
static Case make_close_case(int64_t tokens, int64_t entries, int64_t dim, int64_t panel_columns) {
  Case found = make_case(tokens, entries, dim, 1.0f);
  for (int64_t i = 0; i < tokens * dim; ++i) {
    if (i % dim >= screen_stage_end(0, screen_padded_dim(dim))) found.hidden[i] = found.mean[i % dim];
  }
  std::fill(found.threshold.begin(), found.threshold.end(), kInf);
  for (int64_t v = 0; v < entries; v += panel_columns) {
    double best = -kInf;
    for (int64_t t = 0; t < tokens; ++t) best = std::max(best, product(found, t, v));
    found.threshold[v] = std::nextafter(static_cast<float>(best), -kInf);
  }
  return found;
}

// All integers of a row have the largest absolute value, so that sums are as large as they can be.
static Case make_extreme_case(int64_t tokens, int64_t entries, int64_t dim) {
  Case found = make_case(tokens, entries, dim, 1.0f);
  std::fill(found.mean.begin(), found.mean.end(), 0.0f);
  std::fill(found.threshold.begin(), found.threshold.end(), 0.0f);
  for (int64_t i = 0; i < tokens * dim; ++i) found.hidden[i] = i / dim % 2 == 0 ? 1.0f : -1.0f;
  for (int64_t i = 0; i < entries * dim; ++i) found.weight[i] = i / dim % 3 == 0 ? 1.0f : -1.0f;
  return found;
}

// The norms of a row and of its rounded row differ by at most the residual, since a rotation keeps norms.
static void test_rounding(const Screen& screen, float scale) {
  const int64_t dim = 100, rows = 19;
  Case inputs = make_case(rows, 1, dim, 50.0f);
  std::fill(inputs.mean.begin(), inputs.mean.end(), 0.0f);
  for (float& x : inputs.hidden) x *= scale;
  const Rounded found = round(screen, inputs.hidden, rows, dim, inputs.mean, true);
  for (int64_t row = 0; row < rows; ++row) {
    double squares = 0;
    for (int64_t d = 0; d < dim; ++d) squares += std::pow(double(inputs.hidden[row * dim + d]), 2);
    const double norm = std::sqrt(squares);
    EXPECT(found.norm[row] >= norm, "norm %g of a row of %g", found.norm[row], norm);
    double rounded_squares = 0;
    for (int64_t step = 0; step < found.padded_dim / 4; ++step) {
      const int64_t group = row / kScreenGroup * kScreenGroup * found.padded_dim / 4, lane = row % kScreenGroup;
      const int64_t place =
          screen.has_token_rows ? step / 16 * 256 + lane * 16 + step % 16 : step * kScreenGroup + lane;
      const uint32_t unit = found.units[group + place];
      for (int i = 0; i < 4; ++i) {
        rounded_squares += std::pow(static_cast<int8_t>(unit >> (8 * i)) * double(found.scale[row]), 2);
      }
    }
    EXPECT(std::abs(std::sqrt(rounded_squares) - norm) <= found.residual[row], "residual %g of a row of %g, rounded %g",
           found.residual[row], norm, std::sqrt(rounded_squares));
  }
}

static void test_rows_that_cannot_be_rounded(const Screen& screen) {
  const int64_t dim = 70;
  for (const float bad : {kInf, -kInf, std::numeric_limits<float>::quiet_NaN(), 3e38f}) {
    Case inputs = make_case(5, 1, dim, 1.0f);
    inputs.hidden[2 * dim + 9] = bad;
    const Rounded found = round(screen, inputs.hidden, 5, dim, inputs.mean, true);
    for (int64_t row = 0; row < 5; ++row) {
      EXPECT((found.residual[row] == kInf) == (row == 2), "residual %g of row %ld", found.residual[row],
             static_cast<long>(row));
      EXPECT(row != 2 || found.scale[row] == 0, "scale %g", found.scale[row]);
    }
  }
}

static void test_all(const Screen& screen) {
  int64_t early = 0;
  for (const int64_t dim : {1, 4, 63, 64, 100, 192, 768}) {
    for (const int64_t tokens : {1, 5, 16, 41}) {
      for (const float spread : {1.0f, 100.0f}) {
        const Case inputs = make_case(tokens, 75, dim, spread);
        for (const bool largest : {true, false}) {
          test_screen(screen, inputs, largest, false);
          early += test_screen(screen, inputs, largest, true);
        }
      }
    }
  }
  for (const int64_t dim : {64, 192, 768}) {
    for (const int64_t tokens : {1, 16, 41}) {
      const Case inputs = make_close_case(tokens, 8 * screen.panel_columns, dim, screen.panel_columns);
      test_screen(screen, inputs, true, false);
      test_screen(screen, inputs, true, true);
    }
  }
  for (const int64_t dim : {64, 768}) {
    const Case inputs = make_extreme_case(41, 75, dim);
    for (const bool along_basis : {false, true}) test_screen(screen, inputs, true, along_basis);
  }
  // The kernel with token rows has no stages.
  EXPECT((early > 0) == !screen.has_token_rows, "%ld tiles settled early", static_cast<long>(early));
  for (const float scale : {1e-30f, 1e-12f, 1.0f, 1e12f}) test_rounding(screen, scale);
  test_rows_that_cannot_be_rounded(screen);
  std::printf("%s: screening\n", screen.name);
}

int main() {
  test_all(screen_portable());
#if defined(__x86_64__)
  if (has_avx2()) test_all(screen_avx2());
  if (has_avx2() && __builtin_cpu_supports("avxvnni")) test_all(screen_avxvnni());
  if (has_avx512()) test_all(screen_avx512());
  if (has_avx512vnni()) {
    test_all(screen_avx512vnni());
    test_all(screen_amx_emulated());
  }
  // AMX needs the permission of the system, which screen() has asked for if it has chosen AMX.
  if (std::strcmp(screen().name, "amx") == 0) test_all(screen_amx());
#endif
  return 0;
}
