// Kernels of prune: the candidates of a row, and the largest of them.
#pragma once

#include "isa.h"
#include "kernels.h"

namespace splade_fast::cpu {
namespace {

#if !defined(__AVX512F__)
// Bit i: lane i is set.
template <typename Acc>
inline unsigned lane_bits(Mask<Acc> mask) {
#if defined(__AVX2__)
  if constexpr (sizeof(Acc) == 4) return static_cast<unsigned>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
  if constexpr (sizeof(Acc) == 8) return static_cast<unsigned>(_mm256_movemask_pd(reinterpret_cast<__m256d>(mask)));
#elif defined(__SSE2__)
  if constexpr (sizeof(Acc) == 4) return static_cast<unsigned>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
  if constexpr (sizeof(Acc) == 8) return static_cast<unsigned>(_mm_movemask_pd(reinterpret_cast<__m128d>(mask)));
#else
  unsigned bits = 0;
  for (int i = 0; i < kLanes<Acc>; ++i) bits |= static_cast<unsigned>(mask[i] & 1) << i;
  return bits;
#endif
}
#endif

// Bit i: lane i is above the threshold, or NaN.
template <typename Acc>
inline unsigned lanes_above(Vec<Acc> x, Vec<Acc> threshold) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == 4) {
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(threshold), _CMP_NLE_UQ);
  } else {
    return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(x), reinterpret_cast<__m512d>(threshold), _CMP_NLE_UQ);
  }
#else
  return lane_bits<Acc>(~(x <= threshold));
#endif
}

// Appends the chosen lanes; a whole vector is written, so that much room is needed.
template <typename Acc>
inline void append(Candidates<Acc>& found, Vec<Acc> x, int32_t column, unsigned lanes) {
#if defined(__AVX512F__)
  // Compressed in a register: a compressing store is slow on any machines.
  if constexpr (sizeof(Acc) == 4) {
    const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 mask = static_cast<__mmask16>(lanes);
    store_bits(found.value + found.count, _mm512_maskz_compress_ps(mask, reinterpret_cast<__m512>(x)));
    store_bits(found.column + found.count,
               _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(order, _mm512_set1_epi32(column))));
  } else {
    const __m256i order = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __mmask8 mask = static_cast<__mmask8>(lanes);
    store_bits(found.value + found.count, _mm512_maskz_compress_pd(mask, reinterpret_cast<__m512d>(x)));
    store_bits(found.column + found.count,
               _mm256_maskz_compress_epi32(mask, _mm256_add_epi32(order, _mm256_set1_epi32(column))));
  }
  found.count += __builtin_popcount(lanes);
#else
  for (; lanes != 0; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    found.value[found.count] = x[lane];
    found.column[found.count++] = column + lane;
  }
#endif
}

// Several vectors at a time: most of a SPLADE row is not above the threshold, and one branch skips them all.
template <typename T>
int64_t collect(const T* row, int64_t first, int64_t columns, Accumulator<T> threshold,
                Candidates<Accumulator<T>>& candidates) {
  using Acc = Accumulator<T>;
  Candidates<Acc> found = candidates;  // a copy: the count stays in a register
  constexpr int kVectors = 4;
  constexpr int64_t kStep = kVectors * kLanes<Acc>;
  static_assert(kStep <= Candidates<Acc>::kSlack);
  const Vec<Acc> limit = broadcast<Vec<Acc>>(threshold);
  const int64_t last = found.capacity - kStep;  // more than that, and a step might not fit
  int64_t column = first;
  for (; column + kStep <= columns && found.count <= last; column += kStep) {
    Vec<Acc> x[kVectors];
    unsigned lanes[kVectors], any = 0;
    for (int i = 0; i < kVectors; ++i) {
      x[i] = load_vec(row + column + i * kLanes<Acc>);
      lanes[i] = lanes_above<Acc>(x[i], limit);
      any |= lanes[i];
    }
    if (any == 0) continue;
    for (int i = 0; i < kVectors; ++i) {
      append<Acc>(found, x[i], static_cast<int32_t>(column) + i * kLanes<Acc>, lanes[i]);
    }
  }
  if (column + kStep > columns) {
    for (; column < columns && found.count < found.capacity; ++column) {
      const Acc x = to_acc(row[column]);
      found.value[found.count] = x;
      found.column[found.count] = static_cast<int32_t>(column);
      found.count += !(x <= threshold);
    }
  }
  candidates.count = found.count;
  return column;
}

// Integers in the order of the values: -0 equals 0, and every NaN is above everything.
template <typename Acc>
inline Mask<Acc> ordered(Vec<Acc> x) {
  typedef Mask<Acc> Int;
  constexpr int kSign = 8 * sizeof(Acc) - 1;
  constexpr Position<Acc> kMagnitude = ~(Position<Acc>(1) << kSign);
  const Int bits = reinterpret_cast<Int>(x + Acc(0));
  const Int key = bits ^ ((bits >> kSign) & kMagnitude);
  return x == x ? key : broadcast<Int>(kMagnitude);
}

// The k-th largest is found bit by bit: how many keys are at least the prefix? Counting is all vectors, and there are
// no branches to predict.
template <typename Acc>
Acc keep_largest(Candidates<Acc>& found, int64_t k) {
  typedef Mask<Acc> Int;
  typedef Position<Acc> Key;
  typedef std::make_unsigned_t<Key> Unsigned;
  constexpr int kBits = 8 * sizeof(Acc);
  constexpr Key kLowest = static_cast<Key>(Unsigned(1) << (kBits - 1)), kHighest = ~kLowest;
  const int64_t count = found.count, vectors = (count + kLanes<Acc> - 1) / kLanes<Acc>;
  Int all = {}, any = {};
  for (int64_t i = 0; i < vectors; ++i) {
    Int key = ordered<Acc>(load_bits<Vec<Acc>>(found.value + i * kLanes<Acc>));
    if (const int64_t rest = count - i * kLanes<Acc>; rest < kLanes<Acc>) {
      for (int64_t lane = rest; lane < kLanes<Acc>; ++lane) key[lane] = key[0];
    }
    if (i == 0) all = any = key;
    all &= key;
    any |= key;
    store_bits(found.key + i * kLanes<Acc>, key);
  }
  Key in_all = all[0], in_any = any[0];
  for (int lane = 1; lane < kLanes<Acc>; ++lane) {
    in_all &= all[lane];
    in_any |= any[lane];
  }
  for (int64_t i = count; i < vectors * kLanes<Acc>; ++i) found.key[i] = kLowest;

  // The bits above the highest in which two keys differ are known.
  const Unsigned differ = static_cast<Unsigned>(in_all ^ in_any);
  const int open = differ == 0 ? 0 : 64 - __builtin_clzll(differ);
  const Unsigned fixed = open == kBits ? 0 : ~((Unsigned(1) << open) - 1);
  Unsigned prefix = (static_cast<Unsigned>(in_all) ^ static_cast<Unsigned>(kLowest)) & fixed;
  for (int bit = open - 1; bit >= 0; --bit) {
    const Unsigned candidate = prefix | Unsigned(1) << bit;
    const Int limit = broadcast<Int>(static_cast<Key>(candidate ^ static_cast<Unsigned>(kLowest)));
    Int counts[2] = {};
    int64_t i = 0;
    for (; i + 2 <= vectors; i += 2) {
      counts[0] -= load_bits<Int>(found.key + i * kLanes<Acc>) >= limit;
      counts[1] -= load_bits<Int>(found.key + (i + 1) * kLanes<Acc>) >= limit;
    }
    if (i < vectors) counts[0] -= load_bits<Int>(found.key + i * kLanes<Acc>) >= limit;
    int64_t at_least = 0;
    for (int lane = 0; lane < kLanes<Acc>; ++lane) at_least += counts[0][lane] + counts[1][lane];
    if (at_least >= k) prefix = candidate;
    if (at_least == k) break;  // nothing between the prefix and the k-th largest
  }
  const Key kth = static_cast<Key>(prefix ^ static_cast<Unsigned>(kLowest));
  int64_t ties = k;
  for (int64_t i = 0; i < count; ++i) ties -= found.key[i] > kth;
  int64_t kept = 0;
  Key smallest = kHighest;
  for (int64_t i = 0; i < count; ++i) {
    const Key key = found.key[i];
    const bool tie = key == kth && ties > 0;
    const bool keep = key > kth || tie;
    ties -= tie;
    smallest = keep && key < smallest ? key : smallest;
    found.value[kept] = found.value[i];
    found.column[kept] = found.column[i];
    kept += keep;
  }
  found.count = kept;
  const Key bits = smallest ^ ((smallest >> (kBits - 1)) & kHighest);
  return load_bits<Acc>(&bits);
}

}  // namespace
}  // namespace splade_fast::cpu
