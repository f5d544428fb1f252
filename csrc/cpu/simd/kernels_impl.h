// The CPU kernels in vector extensions, compiled once for each instruction set. This file implements those of the head
// and pool, and collects those of the other ops.
#pragma once

#include "cpu/simd/compensated.h"
#include "cpu/simd/gather_impl.h"
#include "cpu/simd/isa.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/product_impl.h"
#include "cpu/simd/prune_impl.h"
#include "cpu/simd/sample_impl.h"
#include "cpu/simd/score_impl.h"

namespace splade_fast::cpu {
namespace {

template <typename Acc>
using Products = const Vec<Acc> (*)[kPanelVectors];

// Call body(state, first_token, count, products) for each run of tokens of one sequence in a tile. state is the offset
// of the row of the sequence, and products are those of the run.
template <typename T, typename Body>
inline void for_each_run(const Panel<Accumulator<T>>& panel, Body body) {
  const int64_t tile_bytes = packed_bytes<T>(kTileTokens, panel.dim);
  const int64_t num_steps = steps<T>(panel.dim);
  const char* tile = static_cast<const char*>(panel.tokens);
  const int64_t tiles = (panel.num_tokens + kTileTokens - 1) / kTileTokens;
  Vec<Accumulator<T>> products[kTileTokens][kPanelVectors];
  for (int64_t first = 0; first < panel.num_tokens; first += kTileTokens, tile += tile_bytes) {
    prefetch_share(panel.next_weight, panel.next_bytes, first / kTileTokens, tiles);
    multiply_tile<T>(tile, panel.weight, num_steps, products, [] {});
    const int64_t last = first + kTileTokens < panel.num_tokens ? first + kTileTokens : panel.num_tokens;
    for (int64_t begin = first, end = first; begin < last; begin = end) {
      const int32_t sequence = panel.sequence[begin];
      while (end < last && panel.sequence[end] == sequence) ++end;
      body(sequence * panel.state_stride, begin, end - begin, products + (begin - first));
    }
  }
}

template <typename T, bool kArgmax>
void head_max_impl(const Panel<Accumulator<T>>& panel) {
  using Acc = Accumulator<T>;
  for_each_run<T>(panel, [&](int64_t state, int64_t first, int64_t count, Products<Acc> products) {
    for (int j = 0; j < kPanelVectors; ++j, state += kLanes<Acc>) {
      Vec<Acc> value = load_bits<Vec<Acc>>(panel.value + state);
      Mask<Acc> argmax = {};
      if constexpr (kArgmax) argmax = load_bits<Mask<Acc>>(panel.argmax + state);
      for (int64_t t = 0; t < count; ++t) {
        const Mask<Acc> better = beats<Acc>(products[t][j], value);
        value = better ? products[t][j] : value;
        if constexpr (kArgmax) argmax = better ? broadcast<Mask<Acc>>(panel.position[first + t]) : argmax;
      }
      store_bits(panel.value + state, value);
      if constexpr (kArgmax) store_bits(panel.argmax + state, argmax);
    }
  });
}

template <typename T>
void head_max(const Panel<Accumulator<T>>& panel) {
  panel.argmax ? head_max_impl<T, true>(panel) : head_max_impl<T, false>(panel);
}

template <typename Acc>
inline Vec<Acc> activate(Vec<Acc> logit, Activation activation) {
  Vec<Acc> weight = relu<Acc>(logit);
  if (activation != Activation::kRelu) weight = log1p_vec(weight);
  if (activation == Activation::kLog1pLog1pRelu) weight = log1p_vec(weight);
  return weight;
}

// Derivative of the activation at a positive logit.
template <typename Acc>
inline Vec<Acc> activation_slope(Vec<Acc> logit, Activation activation) {
  const Vec<Acc> one = broadcast<Vec<Acc>>(Acc(1));
  Vec<Acc> slope = one;
  if (activation != Activation::kRelu) slope = one / (one + logit);
  if (activation == Activation::kLog1pLog1pRelu) slope = slope / (one + log1p_vec(relu<Acc>(logit)));
  return slope;
}

template <typename T>
void head_sum(const Panel<Accumulator<T>>& panel) {
  using Acc = Accumulator<T>;
  for_each_run<T>(panel, [&](int64_t state, int64_t, int64_t count, Products<Acc> products) {
    for (int j = 0; j < kPanelVectors; ++j) {
      const Vec<Acc> bias = load_bits<Vec<Acc>>(panel.bias + j * kLanes<Acc>);
      Vec<Acc> sum = {};  // of the run: summing in runs reduces the rounding error
      for (int64_t t = 0; t < count; ++t) sum += activate<Acc>(products[t][j] + bias, panel.activation);
      Acc* const value = panel.value + state + j * kLanes<Acc>;
      Acc* const value_lost = panel.lost + state + j * kLanes<Acc>;
      Vec<Acc> total = load_bits<Vec<Acc>>(value), lost = load_bits<Vec<Acc>>(value_lost);
      add_part(total, lost, sum);
      store_bits(value, total);
      store_bits(value_lost, lost);
    }
  });
}

// Call body(column, load, store) for each vector of a row. load and store do not access memory past the end of the row.
template <typename Acc, typename Body>
inline void for_each_vector(int64_t columns, Body body) {
  int64_t column = 0;
  for (; column + kLanes<Acc> <= columns; column += kLanes<Acc>) {
    body(
        column, [](const auto* source) { return load_vec(source); },
        [](auto* target, Vec<Acc> value) { store_vec(target, value); });
  }
  if (const int64_t rest = columns - column; rest > 0) {
    body(
        column, [rest](const auto* source) { return load_partial(source, rest); },
        [rest](auto* target, Vec<Acc> value) { store_partial(target, value, rest); });
  }
}

// Pools kRows rows in one pass, so that the maxima are read and written less often than the logits. The hardware does
// not prefetch that many streams far enough: prefetching 1 KiB ahead saves 15 %.
template <typename T, int kRows, bool kArgmax>
inline void pool_max_rows(const T* const* rows, const int32_t* position, int64_t columns, Accumulator<T>* value,
                          Position<Accumulator<T>>* argmax) {
  using Acc = Accumulator<T>;
  constexpr int64_t kAhead = 1024 / sizeof(T);
  for_each_vector<Acc>(columns, [&](int64_t column, auto load, auto) {
    // The caller pads value and argmax to whole vectors.
    Vec<Acc> best = load_bits<Vec<Acc>>(value + column);
    Mask<Acc> where = {};
    if constexpr (kArgmax) where = load_bits<Mask<Acc>>(argmax + column);
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(rows[r] + column + kAhead);
      const Vec<Acc> logit = load(rows[r] + column);
      const Mask<Acc> better = beats<Acc>(logit, best);
      best = better ? logit : best;
      if constexpr (kArgmax) where = better ? broadcast<Mask<Acc>>(position[r]) : where;
    }
    store_bits(value + column, best);
    if constexpr (kArgmax) store_bits(argmax + column, where);
  });
}

template <typename T, bool kArgmax>
void pool_max_impl(const T* const* rows, const int32_t* position, int64_t count, int64_t columns, Accumulator<T>* value,
                   Position<Accumulator<T>>* argmax) {
  constexpr int kRows = 4;
  int64_t row = 0;
  for (; row + kRows <= count; row += kRows) {
    pool_max_rows<T, kRows, kArgmax>(rows + row, position + row, columns, value, argmax);
  }
  for (; row < count; ++row) {
    pool_max_rows<T, 1, kArgmax>(rows + row, position + row, columns, value, argmax);
  }
}

template <typename T>
void pool_max(const T* const* rows, const int32_t* position, int64_t count, int64_t columns, Accumulator<T>* value,
              Position<Accumulator<T>>* argmax) {
  argmax ? pool_max_impl<T, true>(rows, position, count, columns, value, argmax)
         : pool_max_impl<T, false>(rows, position, count, columns, value, argmax);
}

template <typename T>
void pool_sum(const T* const* rows, int64_t count, int64_t columns, Activation activation, Accumulator<T>* value) {
  using Acc = Accumulator<T>;
  for_each_vector<Acc>(columns, [&](int64_t column, auto load, auto) {
    // Parts are summed with Kahan's compensation, so that the error does not grow with the length.
    constexpr int64_t kPart = 64;
    Vec<Acc> sum = load_bits<Vec<Acc>>(value + column), lost = {};
    for (int64_t first = 0; first < count; first += kPart) {
      const int64_t last = first + kPart < count ? first + kPart : count;
      Vec<Acc> part = {};
      for (int64_t row = first; row < last; ++row) part += activate<Acc>(load(rows[row] + column), activation);
      const Vec<Acc> next = sum + (part - lost);
      lost = (next - sum) - (part - lost);
      lost = lost == lost ? lost : Vec<Acc>{};  // inf - inf is NaN
      sum = next;
    }
    store_bits(value + column, sum);
  });
}

template <typename T>
void activate_logits(Accumulator<T>* logits, const Accumulator<T>* bias, int64_t columns, Activation activation,
                     T* pooled) {
  using Acc = Accumulator<T>;
  // Most logits of a trained model are not positive. A stretch without positive logits skips the logarithms.
  constexpr int64_t kStretch = 4 * kLanes<Acc>;
  for (int64_t start = 0; start < columns; start += kStretch) {
    const int64_t count = start + kStretch < columns ? kStretch : columns - start;
    Acc* logit = logits + start;
    bool is_active = false;
    for (int64_t i = 0; i < count; ++i) {
      if (bias) logit[i] += bias[start + i];
      is_active |= !(logit[i] <= 0);
    }
    if (!is_active) {
      std::memset(pooled + start, 0, count * sizeof(T));
      continue;
    }
    for_each_vector<Acc>(count, [&](int64_t column, auto load, auto store) {
      store(pooled + start + column, activate<Acc>(load(logit + column), activation));
    });
  }
}

// Logits and result are in L, which is Acc for max pooling and T for sum pooling.
template <typename T, typename L>
void coefficients(const T* grad, const L* logit, int64_t columns, Activation activation, L* coefficient) {
  using Acc = Accumulator<T>;
  for_each_vector<Acc>(columns, [&](int64_t column, auto load, auto store) {
    const Vec<Acc> z = load(logit + column);
    // An inactive logit has gradient 0, not grad * 0, which is NaN for an infinite gradient.
    store(coefficient + column, z <= 0 ? Vec<Acc>{} : load(grad + column) * activation_slope<Acc>(z, activation));
  });
}

template <typename T>
void axpy(Accumulator<T>* y, Accumulator<T> a, const T* x, int64_t n) {
  using Acc = Accumulator<T>;
  const Vec<Acc> factor = broadcast<Vec<Acc>>(a);
  for_each_vector<Acc>(n, [&](int64_t i, auto load, auto store) { store(y + i, load(y + i) + factor * load(x + i)); });
}

// Sum some vectors of all rows in registers, so that only the rows are read and only the result is written.
template <typename T, int kVectors>
inline void combine_columns(T* target, const Accumulator<T>* factors, const T* const* rows, int64_t count,
                            int64_t first) {
  using Acc = Accumulator<T>;
  Vec<Acc> sum[kVectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    const Vec<Acc> factor = broadcast<Vec<Acc>>(factors[i]);
    const T* row = rows[i] + first;
    for (int j = 0; j < kVectors; ++j) sum[j] += factor * load_vec(row + j * kLanes<Acc>);
  }
  for (int j = 0; j < kVectors; ++j) store_vec(target + first + j * kLanes<Acc>, sum[j]);
}

template <typename T>
void combine(T* target, const Accumulator<T>* factors, const T* const* rows, int64_t count, int64_t n) {
  using Acc = Accumulator<T>;
  constexpr int kVectors = 8;
  int64_t first = 0;
  for (; first + kVectors * kLanes<Acc> <= n; first += kVectors * kLanes<Acc>) {
    combine_columns<T, kVectors>(target, factors, rows, count, first);
  }
  for (; first + kLanes<Acc> <= n; first += kLanes<Acc>) combine_columns<T, 1>(target, factors, rows, count, first);
  if (first == n) return;
  Vec<Acc> sum = {};
  for (int64_t i = 0; i < count; ++i) {
    sum += broadcast<Vec<Acc>>(factors[i]) * load_partial(rows[i] + first, n - first);
  }
  store_partial(target + first, sum, n - first);
}

template <typename T>
void store_row(T* target, const Accumulator<T>* source, int64_t n) {
  for_each_vector<Accumulator<T>>(n, [&](int64_t i, auto load, auto store) { store(target + i, load(source + i)); });
}

template <typename T>
void load_row(Accumulator<T>* target, const T* source, int64_t n) {
  for_each_vector<Accumulator<T>>(n, [&](int64_t i, auto load, auto store) { store(target + i, load(source + i)); });
}

template <typename T>
constexpr Kernels<T> make_kernels() {
  return {kTileTokens,
          kPanelColumns<Accumulator<T>>,
          Step<T>::kDims,
          packed_bytes<T>,
          pack<T>,
          head_max<T>,
          head_sum<T>,
          multiply_pairs<T>,
          pool_max<T>,
          pool_sum<T>,
          activate_logits<T>,
          coefficients<T, Accumulator<T>>,
          coefficients<T, T>,
          axpy<T>,
          combine<T>,
          store_row<T>,
          load_row<T>,
          collect<T>,
          keep_largest<Accumulator<T>>,
          score_rows<T>,
          store_scores<T>,
          find_above_bounds<Accumulator<T>>,
          multiply_slots<T>,
          sample_tile<Accumulator<T>>,
          group_maximum<Accumulator<T>>};
}

constexpr AllKernels make_all_kernels(const char* name) {
  return {name,      make_kernels<float>(), make_kernels<double>(), make_kernels<bfloat16>(), make_kernels<float16>(),
          grow_older};
}

}  // namespace
}  // namespace splade_fast::cpu
