// The register-tiled product that the head and sample kernels share: both operands packed, a tile of rows of the one
// against a panel of rows of the other. Included by kernels_impl.h.
#pragma once

#include "isa.h"
#include "kernels.h"

namespace splade_fast::cpu {
namespace {

// Shape of the register tile: kTileTokens x (kPanelVectors vectors) accumulators, the operands beside them.
#if defined(__AVX512F__)
constexpr int kTileTokens = 14, kPanelVectors = 2;  // 28 of 32 registers
#elif defined(__aarch64__)
constexpr int kTileTokens = 12, kPanelVectors = 2;
#else
constexpr int kTileTokens = 6, kPanelVectors = 2;  // 12 of 16 registers
#endif

template <typename Acc>
constexpr int kPanelColumns = kPanelVectors * kLanes<Acc>;

// How one depth step of a product is stored and multiplied: by default one element in the accumulation type.
template <typename T>
struct Step {
  using Acc = Accumulator<T>;
  using Unit = Acc;
  static constexpr int kDepth = 1;
  static Unit load(const T* row, int64_t step, int64_t) { return to_acc(row[step]); }
  static Vec<Acc> load_units(const T* row) { return load_vec(row); }
  static Vec<Acc> fma(Vec<Acc> sum, Unit token, const Unit* weight) {
    return sum + broadcast<Vec<Acc>>(token) * load_bits<Vec<Acc>>(weight);
  }
};

#if defined(__AVX512BF16__)
// Two bfloat16 at a time through the dot-product instruction, which accumulates in float.
template <>
struct Step<bfloat16> {
  using Acc = float;
  using Unit = uint32_t;
  static constexpr int kDepth = 2;
  static Unit load(const bfloat16* row, int64_t step, int64_t depth) {
    const uint32_t low = row[2 * step].bits;
    const uint32_t high = 2 * step + 1 < depth ? row[2 * step + 1].bits : 0;
    return low | high << 16;
  }
  static Vec<float> load_units(const bfloat16* row) { return load_bits<Vec<float>>(row); }
  static Vec<float> fma(Vec<float> sum, Unit token, const Unit* weight) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(token));
    return reinterpret_cast<Vec<float>>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(pair), load_bits<__m512bh>(weight)));
  }
};
#endif

template <typename T>
int64_t steps(int64_t depth) {
  return (depth + Step<T>::kDepth - 1) / Step<T>::kDepth;
}

template <typename T>
int64_t packed_bytes(int64_t lanes, int64_t depth) {
  return lanes * steps<T>(depth) * static_cast<int64_t>(sizeof(typename Step<T>::Unit));
}

// kLanes rows by kLanes steps, transposed in registers. Of the rows only the first `count` are there; where fewer than
// kLanes lanes belong to a step, the rest of each store is overwritten by the next, except after the last.
template <typename T>
inline void pack_square(typename Step<T>::Unit* target, int64_t lanes, const T* const* rows, int64_t count, bool last) {
  constexpr int kCount = kLanes<Accumulator<T>>;
  Vec<Accumulator<T>> square[kCount];
  for (int i = 0; i < kCount; ++i) square[i] = i < count ? Step<T>::load_units(rows[i]) : Vec<Accumulator<T>>{};
  transpose(square);
  for (int i = 0; i < kCount; ++i) {
    if (last && lanes < kCount && i + 1 == kCount) {
      std::memcpy(target + i * lanes, &square[i], lanes * sizeof(*target));
    } else {
      store_bits(target + i * lanes, square[i]);
    }
  }
}

template <typename T>
void pack(void* packed, int64_t lanes, const T* base, int64_t stride, const int64_t* rows, int64_t count,
          int64_t depth) {
  using Unit = typename Step<T>::Unit;
  constexpr int64_t kCount = kLanes<Accumulator<T>>;
  Unit* target = static_cast<Unit*>(packed);
  const int64_t num_steps = steps<T>(depth), whole_steps = depth / (Step<T>::kDepth * kCount) * kCount;
  const auto row = [&](int64_t lane) { return base + (rows ? rows[lane] : lane) * stride; };
  int64_t packed_lanes = 0;
  for (; packed_lanes + kCount <= lanes || packed_lanes == 0; packed_lanes += kCount) {
    const int64_t there = count - packed_lanes < kCount ? count - packed_lanes : kCount;
    const T* square[kCount];
    for (int64_t i = 0; i < there; ++i) square[i] = row(packed_lanes + i);
    for (int64_t step = 0; step < whole_steps; step += kCount) {
      pack_square<T>(target + step * lanes + packed_lanes, lanes, square, there, step + kCount == num_steps);
      for (int64_t i = 0; i < there; ++i) square[i] += kCount * Step<T>::kDepth;
    }
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t first = lane < packed_lanes ? whole_steps : 0;
    for (int64_t step = first; step < num_steps; ++step) {
      target[step * lanes + lane] = lane < count ? Step<T>::load(row(lane), step, depth) : Unit{};
    }
  }
}

// products[token][column] of one tile of tokens and one panel of vocabulary entries. Sums run over kPart steps at a
// time, and then over these parts: a single sum over D = 768 has three times the error.
template <typename T>
inline void multiply_tile(const void* tokens, const void* weight, int64_t num_steps,
                          Vec<Accumulator<T>> (&products)[kTileTokens][kPanelVectors]) {
  using Acc = Accumulator<T>;
  using Unit = typename Step<T>::Unit;
  constexpr int64_t kPart = 128;
  const Unit* token = static_cast<const Unit*>(tokens);
  const Unit* entry = static_cast<const Unit*>(weight);
  int64_t first = 0;
  do {  // once also where the depth is 0
    const int64_t last = first + kPart < num_steps ? first + kPart : num_steps;
    Vec<Acc> sum[kTileTokens][kPanelVectors] = {};
    for (int64_t step = first; step < last; ++step, token += kTileTokens, entry += kPanelColumns<Acc>) {
      for (int r = 0; r < kTileTokens; ++r) {
        for (int j = 0; j < kPanelVectors; ++j) sum[r][j] = Step<T>::fma(sum[r][j], token[r], entry + j * kLanes<Acc>);
      }
    }
    for (int r = 0; r < kTileTokens; ++r) {
      for (int j = 0; j < kPanelVectors; ++j) products[r][j] = first == 0 ? sum[r][j] : products[r][j] + sum[r][j];
    }
    first = last;
  } while (first < num_steps);
}

}  // namespace
}  // namespace splade_fast::cpu
