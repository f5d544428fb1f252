// Kernels of prune: collecting entries of a row, and keeping the largest of them.
#pragma once

#include "cpu/simd/isa.h"
#include "cpu/simd/kernels.h"

namespace splade_fast::cpu {
namespace {

// Return an integer whose bit i says whether lane i is above the threshold or NaN.
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

// Append the lanes whose bit is set. The buffers need room for a whole vector.
template <typename Acc>
inline void append(RowEntries<Acc>& found, Vec<Acc> x, int32_t column, unsigned lanes) {
#if defined(__AVX512F__)
  // The lanes are compressed in a register, because a compressing store is slow on some machines.
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

// Read several vectors at a time. Most entries of a SPLADE row are not above the threshold, so one branch mostly skips
// all of these vectors.
template <typename T>
int64_t collect(const T* row, int64_t first, int64_t columns, Accumulator<T> threshold,
                RowEntries<Accumulator<T>>& entries) {
  using Acc = Accumulator<T>;
  RowEntries<Acc> found = entries;  // a copy, so that the count stays in a register
  constexpr int kVectors = 4;
  constexpr int64_t kStep = kVectors * kLanes<Acc>;
  constexpr int64_t kAhead = 2048 / sizeof(T);  // farther than the hardware prefetches
  static_assert(kStep <= RowEntries<Acc>::kSlack);
  const Vec<Acc> limit = broadcast<Vec<Acc>>(threshold);
  const int64_t last = found.capacity - kStep;  // largest count at which a step surely fits
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
  entries.count = found.count;
  return column;
}

// Sort keys of the values.
template <typename Acc>
inline Mask<Acc> value_keys(Vec<Acc> x) {
  typedef Mask<Acc> Int;
  constexpr int kSign = 8 * sizeof(Acc) - 1;
  constexpr SortKey<Acc> kMagnitude = ~(SortKey<Acc>(1) << kSign);
  const Int bits = reinterpret_cast<Int>(x + Acc(0));
  const Int key = bits ^ ((bits >> kSign) & kMagnitude);
  return x == x ? key : broadcast<Int>(kMagnitude);
}

// Return an integer whose bit i says whether lane i of the keys is at least the limit.
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
inline int64_t count_at_least(const RowEntries<Acc>& found, int64_t vectors, SortKey<Acc> key) {
  const Mask<Acc> limit = broadcast<Mask<Acc>>(key);
  int64_t count = 0;
  for (int64_t i = 0; i < vectors; ++i) {
    count += __builtin_popcount(lanes_at_least<Acc>(load_bits<Mask<Acc>>(found.key + i * kLanes<Acc>), limit));
  }
  return count;
}

// Keep the entries whose key is above the k-th key, and the first `ties` of those whose key equals it.
template <typename Acc>
inline void keep_above(RowEntries<Acc>& found, [[maybe_unused]] int64_t vectors, SortKey<Acc> kth, int64_t ties) {
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
    // A whole vector is written, but no entry that has not been read yet.
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
    const SortKey<Acc> key = found.key[i];
    const bool is_kept_tie = key == kth && ties > 0;
    ties -= is_kept_tie;
    found.value[kept] = found.value[i];
    found.column[kept] = found.column[i];
    kept += key > kth || is_kept_tie;
  }
  found.count = kept;
#endif
}

// Find the key of the k-th largest entry bit by bit, by counting the keys that are at least a prefix of bits. Counting
// uses vectors only and has no branches to predict.
template <typename Acc>
Acc keep_largest(RowEntries<Acc>& entries, int64_t k) {
  typedef Mask<Acc> Int;
  typedef SortKey<Acc> Key;
  typedef std::make_unsigned_t<Key> Unsigned;
  constexpr int kBits = 8 * sizeof(Acc);
  constexpr Key kLowest = static_cast<Key>(Unsigned(1) << (kBits - 1)), kHighest = ~kLowest;
  RowEntries<Acc> found = entries;
  const int64_t count = found.count, vectors = (count + kLanes<Acc> - 1) / kLanes<Acc>;
  // Copies of the first entry fill the last vector while the bits that all keys share are found.
  for (int64_t i = count; i < vectors * kLanes<Acc>; ++i) found.value[i] = found.value[0];
  Int all = ~Int{}, any = {};
  for (int64_t i = 0; i < vectors; ++i) {
    const Int key = value_keys<Acc>(load_bits<Vec<Acc>>(found.value + i * kLanes<Acc>));
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

  // All keys share the bits above the highest one in which two keys differ.
  const Unsigned differ = static_cast<Unsigned>(in_all ^ in_any);
  const int open = differ == 0 ? 0 : 64 - __builtin_clzll(differ);
  const Unsigned fixed = open == kBits ? 0 : ~((Unsigned(1) << open) - 1);
  const auto signed_key = [](Unsigned prefix) { return static_cast<Key>(prefix ^ static_cast<Unsigned>(kLowest)); };
  Unsigned prefix = (static_cast<Unsigned>(in_all) ^ static_cast<Unsigned>(kLowest)) & fixed;
  int64_t at_least = count;  // number of keys that are at least the prefix
  for (int bit = open - 1; bit >= 0 && at_least > k; --bit) {
    const Unsigned longer = prefix | Unsigned(1) << bit;
    const int64_t above = count_at_least(found, vectors, signed_key(longer));
    if (above < k) continue;
    prefix = longer;
    at_least = above;
  }

  // If exactly k keys are at least the prefix, the k-th largest is the smallest of these. Otherwise it is the prefix.
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
    ties = k;  // every tie is kept
  }
  keep_above(found, vectors, kth, ties);
  entries.count = found.count;
  const Key bits = kth ^ ((kth >> (kBits - 1)) & kHighest);
  return load_bits<Acc>(&bits);
}

}  // namespace
}  // namespace splade_fast::cpu
