// Register-tiled product of the head and sample kernels. Both operands are packed: a tile of rows of one (tokens) is
// multiplied by a panel of rows of the other (vocabulary entries).
#pragma once

#include "cpu/prefetch.h"
#include "cpu/simd/isa.h"
#include "cpu/simd/kernels.h"

namespace splade_fast::cpu {
namespace {

// Shape of the register tile, kTileTokens x kPanelVectors accumulators. The operands take the other registers.
#if defined(__AVX512F__)
constexpr int kTileTokens = 14, kPanelVectors = 2;  // 28 of 32 registers
#elif defined(__aarch64__)
constexpr int kTileTokens = 12, kPanelVectors = 2;
#else
constexpr int kTileTokens = 6, kPanelVectors = 2;  // 12 of 16 registers
#endif

template <typename Acc>
constexpr int kPanelColumns = kPanelVectors * kLanes<Acc>;

// Storage and multiplication of one step along the dimensions: by default one element, in the accumulation type.
template <typename T>
struct Step {
  using Acc = Accumulator<T>;
  using Unit = Acc;
  static constexpr int kDims = 1;
  static Unit load(const T* row, int64_t step, int64_t) { return to_acc(row[step]); }
  static Vec<Acc> load_units(const T* row) { return load_vec(row); }
  static Vec<Acc> fma(Vec<Acc> sum, Vec<Acc> token, Vec<Acc> weight) { return sum + token * weight; }
};

#if defined(__AVX512BF16__)
// A step of two bfloat16, multiplied by the dot-product instruction, which accumulates in float.
template <>
struct Step<bfloat16> {
  using Acc = float;
  using Unit = uint32_t;
  static constexpr int kDims = 2;
  static Unit load(const bfloat16* row, int64_t step, int64_t dim) {
    const uint32_t low = row[2 * step].bits;
    const uint32_t high = 2 * step + 1 < dim ? row[2 * step + 1].bits : 0;
    return low | high << 16;
  }
  static Vec<float> load_units(const bfloat16* row) { return load_bits<Vec<float>>(row); }
  static Vec<float> fma(Vec<float> sum, Vec<float> token, Vec<float> weight) {
    return reinterpret_cast<Vec<float>>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(token), reinterpret_cast<__m512bh>(weight)));
  }
};
#endif

// A vector whose units are all equal.
template <typename T>
inline Vec<Accumulator<T>> broadcast_unit(typename Step<T>::Unit unit) {
  typedef typename Step<T>::Unit Units __attribute__((vector_size(kVectorBytes)));
  return reinterpret_cast<Vec<Accumulator<T>>>(broadcast<Units>(unit));
}

template <typename T>
int64_t steps(int64_t dim) {
  return (dim + Step<T>::kDims - 1) / Step<T>::kDims;
}

template <typename T>
int64_t packed_bytes(int64_t lanes, int64_t dim) {
  return lanes * steps<T>(dim) * static_cast<int64_t>(sizeof(typename Step<T>::Unit));
}

// Pack a square of kLanes rows and kLanes steps, transposed in registers. Rows from `count` on are zero. If a step has
// fewer than kLanes lanes, each store writes too much, and the next store overwrites the excess; the last store must
// not write too much.
template <typename T>
inline void pack_square(typename Step<T>::Unit* target, int64_t lanes, const T* const* rows, int64_t count,
                        bool is_last) {
  constexpr int kCount = kLanes<Accumulator<T>>;
  Vec<Accumulator<T>> square[kCount];
  for (int i = 0; i < kCount; ++i) square[i] = i < count ? Step<T>::load_units(rows[i]) : Vec<Accumulator<T>>{};
  transpose(square);
  for (int i = 0; i < kCount; ++i) {
    if (is_last && lanes < kCount && i + 1 == kCount) {
      std::memcpy(target + i * lanes, &square[i], lanes * sizeof(*target));
    } else {
      store_bits(target + i * lanes, square[i]);
    }
  }
}

template <typename T>
void pack(void* packed, int64_t lanes, const T* base, int64_t stride, const int64_t* rows, int64_t count, int64_t dim) {
  using Unit = typename Step<T>::Unit;
  constexpr int64_t kCount = kLanes<Accumulator<T>>;
  Unit* target = static_cast<Unit*>(packed);
  const int64_t num_steps = steps<T>(dim), whole_steps = dim / (Step<T>::kDims * kCount) * kCount;
  const auto row = [&](int64_t lane) { return base + (rows ? rows[lane] : lane) * stride; };
  int64_t packed_lanes = 0;
  for (; packed_lanes + kCount <= lanes || packed_lanes == 0; packed_lanes += kCount) {
    const int64_t there = count - packed_lanes < kCount ? count - packed_lanes : kCount;
    const T* square[kCount];
    for (int64_t i = 0; i < there; ++i) square[i] = row(packed_lanes + i);
    for (int64_t step = 0; step < whole_steps; step += kCount) {
      pack_square<T>(target + step * lanes + packed_lanes, lanes, square, there, step + kCount == num_steps);
      for (int64_t i = 0; i < there; ++i) square[i] += kCount * Step<T>::kDims;
    }
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t first = lane < packed_lanes ? whole_steps : 0;
    for (int64_t step = first; step < num_steps; ++step) {
      target[step * lanes + lane] = lane < count ? Step<T>::load(row(lane), step, dim) : Unit{};
    }
  }
}

// Products are summed over parts of kPart steps, and then over the parts. A single sum over D = 768 would have three
// times the error.
constexpr int64_t kPart = 128;

// Compute products[token][column] of a tile of tokens and a panel of vocabulary entries. before_part() is called
// before each part.
template <typename T, typename BeforePart>
inline void multiply_tile(const void* tokens, const void* weight, int64_t num_steps,
                          Vec<Accumulator<T>> (&products)[kTileTokens][kPanelVectors], const BeforePart& before_part) {
  using Acc = Accumulator<T>;
  using Unit = typename Step<T>::Unit;
  const Unit* token = static_cast<const Unit*>(tokens);
  const Unit* entry = static_cast<const Unit*>(weight);
  int64_t first = 0;
  do {  // at least once, because dim may be 0
    before_part();
    const int64_t last = first + kPart < num_steps ? first + kPart : num_steps;
    Vec<Acc> sum[kTileTokens][kPanelVectors] = {};
    for (int64_t step = first; step < last; ++step, token += kTileTokens, entry += kPanelColumns<Acc>) {
      for (int r = 0; r < kTileTokens; ++r) {
        for (int j = 0; j < kPanelVectors; ++j) {
          sum[r][j] =
              Step<T>::fma(sum[r][j], broadcast_unit<T>(token[r]), load_bits<Vec<Acc>>(entry + j * kLanes<Acc>));
        }
      }
    }
    for (int r = 0; r < kTileTokens; ++r) {
      for (int j = 0; j < kPanelVectors; ++j) products[r][j] = first == 0 ? sum[r][j] : products[r][j] + sum[r][j];
    }
    first = last;
  } while (first < num_steps);
}

// Compute products of pairs of rows, with a lane for each pair. The operations are those of multiply_tile, so the bits
// are the same.
template <typename T>
void multiply_pairs(const T* const* tokens, const T* const* entries, int64_t count, int64_t dim,
                    Accumulator<T>* products) {
  using Acc = Accumulator<T>;
  using Units = Vec<Acc>;
  constexpr int kCount = kLanes<Acc>;
  constexpr int64_t kSquare = kCount * Step<T>::kDims;
  static_assert(kPart % kCount == 0);
  const int64_t num_steps = steps<T>(dim), whole_steps = dim / kSquare * kCount;
  for (int64_t first_pair = 0; first_pair < count; first_pair += kCount) {
    const T *token[kCount], *entry[kCount];
    for (int64_t i = 0; i < kCount; ++i) {
      const int64_t pair = first_pair + i < count ? first_pair + i : count - 1;
      token[i] = tokens[pair];
      entry[i] = entries[pair];
    }
    Vec<Acc> total = {}, sum = {};
    for (int64_t step = 0; step < num_steps; step += kCount) {
      Units token_units[kCount], entry_units[kCount];
      const int64_t last = num_steps - step < kCount ? num_steps - step : kCount;
      if (step < whole_steps) {
        for (int i = 0; i < kCount; ++i) {
          token_units[i] = Step<T>::load_units(token[i] + step * Step<T>::kDims);
          entry_units[i] = Step<T>::load_units(entry[i] + step * Step<T>::kDims);
        }
        transpose(token_units);
        transpose(entry_units);
      } else {
        typename Step<T>::Unit token_unit[kCount], entry_unit[kCount];
        for (int64_t s = 0; s < last; ++s) {
          for (int i = 0; i < kCount; ++i) {
            token_unit[i] = Step<T>::load(token[i], step + s, dim);
            entry_unit[i] = Step<T>::load(entry[i], step + s, dim);
          }
          token_units[s] = load_bits<Units>(token_unit);
          entry_units[s] = load_bits<Units>(entry_unit);
        }
      }
      for (int64_t s = 0; s < last; ++s) sum = Step<T>::fma(sum, token_units[s], entry_units[s]);
      if ((step + kCount) % kPart == 0 || step + kCount >= num_steps) {
        total = step < kPart ? sum : total + sum;
        sum = Vec<Acc>{};
      }
    }
    for (int64_t i = 0; i < kCount && first_pair + i < count; ++i) products[first_pair + i] = total[i];
  }
}

// Prefetch one of several parts of the memory that is packed next, so that the products hide its latency.
inline void prefetch_share(const void* next, int64_t bytes, int64_t part, int64_t parts) {
  constexpr int64_t kLine = 64;
  const int64_t share = (bytes / parts / kLine + 1) * kLine;
  const int64_t begin = part * share, end = begin + share < bytes ? begin + share : bytes;
  prefetch_lines<false, 2>(static_cast<const char*>(next) + begin, end - begin);
}

}  // namespace
}  // namespace splade_fast::cpu
