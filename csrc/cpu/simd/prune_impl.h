// Kernels of prune: collecting entries of a row, and keeping the largest of them.
#pragma once

#include "cpu/simd/isa.h"
#include "cpu/simd/kernels.h"

namespace splade_fast::cpu {
namespace {

// The vector 0, 1, 2, ...
template <typename Acc>
inline Columns<Acc> lane_numbers() {
  Columns<Acc> numbers;
  for (int lane = 0; lane < kLanes<Acc>; ++lane) numbers[lane] = lane;
  return numbers;
}

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
  if constexpr (kCanCompress) {
    // The lanes are compressed in a register, because a compressing store is slow on some machines.
    store_bits(found.value + found.count, compress(x, lanes));
    store_bits(found.column + found.count, compress(column + lane_numbers<Acc>(), lanes));
    found.count += __builtin_popcount(lanes);
  } else {
    for (; lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      found.value[found.count] = x[lane];
      found.column[found.count++] = column + lane;
    }
  }
}

constexpr int kStepVectors = 4;  // vectors that are read at a time
template <typename Acc>
constexpr int64_t kStepColumns = kStepVectors * kLanes<Acc>;

// How many entries of a stretch are above the threshold. A branch skips the steps that have none while most have none;
// then a branch could not be predicted, and each step writes kFew entries, of which those count that are above the
// threshold; with many, each vector is compressed.
enum class Density { kMostStepsHaveNone, kFew, kMany };

// Append the entries of columns [column, stop) that are above the limit, and return the column after the last one read.
template <Density kDensity, typename T>
inline int64_t collect_stretch(const T* row, int64_t column, int64_t stop, Vec<Accumulator<T>> limit,
                               RowEntries<Accumulator<T>>& found) {
  using Acc = Accumulator<T>;
  constexpr int kFew = 2;
  constexpr int64_t kAhead = 2048 / sizeof(T);  // farther than the hardware prefetches
  constexpr uint64_t kLastBit = uint64_t(1) << (kStepColumns<Acc> - 1);
  static_assert(kStepColumns<Acc> <= RowEntries<Acc>::kSlack);
  const int64_t last = found.capacity - kStepColumns<Acc>;  // largest count at which a step surely fits
  for (; column + kStepColumns<Acc> <= stop && found.count <= last; column += kStepColumns<Acc>) {
    Vec<Acc> x[kStepVectors];
    uint64_t bits = 0;
    for (int i = 0; i < kStepVectors; ++i) {
      __builtin_prefetch(row + column + i * kLanes<Acc> + kAhead);
      x[i] = load_vec(row + column + i * kLanes<Acc>);
      const unsigned lanes = lanes_above<Acc>(x[i], limit);
      if constexpr (kDensity == Density::kMany) {
        append<Acc>(found, x[i], static_cast<int32_t>(column) + i * kLanes<Acc>, lanes);
      } else {
        bits |= static_cast<uint64_t>(lanes) << (i * kLanes<Acc>);
      }
    }
    if (kDensity == Density::kMostStepsHaveNone && bits == 0) continue;
    if constexpr (kDensity != Density::kMany) {
      const int count = __builtin_popcountll(bits);
      for (int i = 0; i < kFew || i < count; ++i, bits &= bits - 1) {
        const int64_t place = column + __builtin_ctzll(bits | kLastBit);
        found.value[found.count + i] = to_acc(row[place]);
        found.column[found.count + i] = static_cast<int32_t>(place);
      }
      found.count += count;
    }
  }
  return column;
}

// Density of a stretch of columns in which `count` entries were found. The limits are measured.
inline Density density(int64_t count, int64_t columns) {
  if (count * 128 < columns) return Density::kMostStepsHaveNone;
  return count * 16 < columns || !kCanCompress ? Density::kFew : Density::kMany;
}

template <typename T>
int64_t collect(const T* row, int64_t first, int64_t columns, Accumulator<T> threshold,
                RowEntries<Accumulator<T>>& entries) {
  using Acc = Accumulator<T>;
  constexpr int64_t kStretch = 1024;
  RowEntries<Acc> found = entries;  // a copy, so that the count stays in a register
  const Vec<Acc> limit = broadcast<Vec<Acc>>(threshold);
  auto collect_next = collect_stretch<Density::kFew, T>;  // the next stretch is likely to be as the one before
  int64_t column = first;
  for (int64_t start = -1; start != column;) {  // until nothing more fits
    start = column;
    const int64_t stop = columns - start < kStretch ? columns : start + kStretch, before = found.count;
    column = collect_next(row, start, stop, limit, found);
    switch (density(found.count - before, column - start)) {
      case Density::kMostStepsHaveNone:
        collect_next = collect_stretch<Density::kMostStepsHaveNone, T>;
        break;
      case Density::kFew:
        collect_next = collect_stretch<Density::kFew, T>;
        break;
      case Density::kMany:
        collect_next = collect_stretch<Density::kMany, T>;
        break;
    }
  }
  if (column + kStepColumns<Acc> > columns) {
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
#if defined(__AVX512F__)
  int64_t count = 0;
  for (int64_t i = 0; i < vectors; ++i) {
    count += __builtin_popcount(lanes_at_least<Acc>(load_bits<Mask<Acc>>(found.key + i * kLanes<Acc>), limit));
  }
  return count;
#else
  // A lane of a mask is -1 where it is set.
  Mask<Acc> below = {};
  for (int64_t i = 0; i < vectors; ++i) below += load_bits<Mask<Acc>>(found.key + i * kLanes<Acc>) < limit;
  int64_t count = vectors * kLanes<Acc>;
  for (int lane = 0; lane < kLanes<Acc>; ++lane) count += below[lane];
  return count;
#endif
}

// Keep the entries whose key is above the k-th key, and the first `ties` of those whose key equals it.
template <typename Acc>
inline void keep_above(RowEntries<Acc>& found, [[maybe_unused]] int64_t vectors, SortKey<Acc> kth, int64_t ties) {
  int64_t kept = 0;
  if constexpr (kCanCompress) {
    const Mask<Acc> limit = broadcast<Mask<Acc>>(kth);
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
      store_bits(found.value + kept, compress(load_bits<Vec<Acc>>(found.value + first), keep));
      store_bits(found.column + kept, compress(load_bits<Columns<Acc>>(found.column + first), keep));
      kept += __builtin_popcount(keep);
    }
  } else {
    for (int64_t i = 0; i < found.count; ++i) {
      const SortKey<Acc> key = found.key[i];
      const bool is_kept_tie = key == kth && ties > 0;
      ties -= is_kept_tie;
      found.value[kept] = found.value[i];
      found.column[kept] = found.column[i];
      kept += key > kth || is_kept_tie;
    }
  }
  found.count = kept;
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
