// Kernels of prune: the candidates of a row, and the largest of them.
#pragma once

#include "cpu/simd/isa.h"
#include "cpu/simd/kernels.h"

namespace splade_fast::cpu {
namespace {

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
  // Compressed in a register: a compressing store is slow on some machines.
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
  constexpr int64_t kAhead = 2048 / sizeof(T);  // farther than the hardware looks by itself
  static_assert(kStep <= Candidates<Acc>::kSlack);
  const Vec<Acc> limit = broadcast<Vec<Acc>>(threshold);
  const int64_t last = found.capacity - kStep;  // more than that, and a step might not fit
  int64_t column = first;
  for (; column + kStep <= columns && found.count <= last; column += kStep) {
    Vec<Acc> x[kVectors];
    unsigned lanes[kVectors], any = 0;
    for (int i = 0; i < kVectors; ++i) {
      __builtin_prefetch(row + column + i * kLanes<Acc> + kAhead);
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

// Bit i: lane i of the keys is at least the limit.
template <typename Acc>
inline unsigned lanes_at_least(Mask<Acc> key, Mask<Acc> limit) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == 4) {
    return _mm512_cmpge_epi32_mask(reinterpret_cast<__m512i>(key), reinterpret_cast<__m512i>(limit));
  } else {
    return _mm512_cmpge_epi64_mask(reinterpret_cast<__m512i>(key), reinterpret_cast<__m512i>(limit));
  }
#else
  return lane_bits<Acc>(key >= limit);
#endif
}

template <typename Acc>
inline int64_t count_at_least(const Candidates<Acc>& found, int64_t vectors, Position<Acc> key) {
  const Mask<Acc> limit = broadcast<Mask<Acc>>(key);
  int64_t count = 0;
  for (int64_t i = 0; i < vectors; ++i) {
    count += __builtin_popcount(lanes_at_least<Acc>(load_bits<Mask<Acc>>(found.key + i * kLanes<Acc>), limit));
  }
  return count;
}

// Keeps the candidates above the k-th key, and the first `ties` of those equal to it.
template <typename Acc>
inline void keep_above(Candidates<Acc>& found, [[maybe_unused]] int64_t vectors, Position<Acc> kth, int64_t ties) {
#if defined(__AVX512F__)
  const Mask<Acc> limit = broadcast<Mask<Acc>>(kth);
  int64_t kept = 0;
  for (int64_t i = 0; i < vectors; ++i) {
    const int64_t first = i * kLanes<Acc>;
    const Mask<Acc> key = load_bits<Mask<Acc>>(found.key + first);
    unsigned keep = lanes_at_least<Acc>(key, limit);
    unsigned equal = keep & lanes_at_least<Acc>(limit, key);
    if (equal != 0) {
      keep &= ~equal;
      for (; equal != 0 && ties > 0; equal &= equal - 1, --ties) keep |= equal & -equal;
    }
    // A whole vector is written, but never past what has been read.
    if constexpr (sizeof(Acc) == 4) {
      const __mmask16 mask = static_cast<__mmask16>(keep);
      const __m512i column = load_bits<__m512i>(found.column + first);
      store_bits(found.value + kept, _mm512_maskz_compress_ps(mask, load_bits<__m512>(found.value + first)));
      store_bits(found.column + kept, _mm512_maskz_compress_epi32(mask, column));
    } else {
      const __mmask8 mask = static_cast<__mmask8>(keep);
      const __m256i column = load_bits<__m256i>(found.column + first);
      store_bits(found.value + kept, _mm512_maskz_compress_pd(mask, load_bits<__m512d>(found.value + first)));
      store_bits(found.column + kept, _mm256_maskz_compress_epi32(mask, column));
    }
    kept += __builtin_popcount(keep);
  }
  found.count = kept;
#else
  int64_t kept = 0;
  for (int64_t i = 0; i < found.count; ++i) {
    const Position<Acc> key = found.key[i];
    const bool tie = key == kth && ties > 0;
    ties -= tie;
    found.value[kept] = found.value[i];
    found.column[kept] = found.column[i];
    kept += key > kth || tie;
  }
  found.count = kept;
#endif
}

// The k-th largest is found bit by bit: how many keys are at least the prefix? Counting is all vectors, and there are
// no branches to predict.
template <typename Acc>
Acc keep_largest(Candidates<Acc>& candidates, int64_t k) {
  typedef Mask<Acc> Int;
  typedef Position<Acc> Key;
  typedef std::make_unsigned_t<Key> Unsigned;
  constexpr int kBits = 8 * sizeof(Acc);
  constexpr Key kLowest = static_cast<Key>(Unsigned(1) << (kBits - 1)), kHighest = ~kLowest;
  Candidates<Acc> found = candidates;
  const int64_t count = found.count, vectors = (count + kLanes<Acc> - 1) / kLanes<Acc>;
  // The last vector is filled up with the first candidate, until the bits that all share are known.
  for (int64_t i = count; i < vectors * kLanes<Acc>; ++i) found.value[i] = found.value[0];
  Int all = ~Int{}, any = {};
  for (int64_t i = 0; i < vectors; ++i) {
    const Int key = ordered<Acc>(load_bits<Vec<Acc>>(found.value + i * kLanes<Acc>));
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
  const auto signed_key = [](Unsigned prefix) { return static_cast<Key>(prefix ^ static_cast<Unsigned>(kLowest)); };
  Unsigned prefix = (static_cast<Unsigned>(in_all) ^ static_cast<Unsigned>(kLowest)) & fixed;
  int64_t at_least = count;  // the prefix
  for (int bit = open - 1; bit >= 0 && at_least > k; --bit) {
    const Unsigned candidate = prefix | Unsigned(1) << bit;
    const int64_t found_above = count_at_least(found, vectors, signed_key(candidate));
    if (found_above < k) continue;
    prefix = candidate;
    at_least = found_above;
  }

  // Where exactly k are at least the prefix, the k-th largest is the smallest of them; otherwise it is the prefix.
  Key kth = signed_key(prefix);
  int64_t ties = 0;
  if (at_least > k) {
    ties = kth == kHighest ? k : k - count_at_least(found, vectors, kth + 1);
  } else {
    const Int limit = broadcast<Int>(kth);
    Int smallest = broadcast<Int>(kHighest);
    for (int64_t i = 0; i < vectors; ++i) {
      const Int key = load_bits<Int>(found.key + i * kLanes<Acc>);
      const Int kept = key >= limit ? key : smallest;
      smallest = kept < smallest ? kept : smallest;
    }
    kth = smallest[0];
    for (int lane = 1; lane < kLanes<Acc>; ++lane) kth = smallest[lane] < kth ? smallest[lane] : kth;
    ties = k;  // all of them
  }
  keep_above(found, vectors, kth, ties);
  candidates.count = found.count;
  const Key bits = kth ^ ((kth >> (kBits - 1)) & kHighest);
  return load_bits<Acc>(&bits);
}

}  // namespace
}  // namespace splade_fast::cpu
