// The k largest of a row of keys, in order, by one block. Of equal keys the first stay. Keys are unsigned integers of
// 32, 64 or 128 bits.
//
// collect() reads the row once, a tile of keys at a time, and appends the keys above a floor to a buffer in shared
// memory. When a tile does not fit, shrink() keeps the k largest of the buffer, and the k-th becomes the floor, since a
// later equal key loses the tie. With k = 2, room for 4 keys and tiles of 2, the row 3 1 | 4 1 | 5 9 | 2 6 gives
//   3 1  ->  3 1 4 1  ->  full: 3 4, floor 3  ->  3 4 5 9  ->  full: 5 9, floor 5  ->  5 9 6
// So a row costs one pass, whatever it holds. find_kth() finds the k-th of what is left, 6, and in_order() calls
// place() for 9 and 6. For a k that leaves the buffer no room for a tile, the buffer overflows, and find_kth() and
// in_order() read the row itself.
//
// find_kth() goes through the digits of a key from the highest: it counts how often each digit comes among the keys
// that agree with the digits known so far, and takes the one in which the count from above reaches k. Each digit is a
// pass over the keys. Those of a row that agree with the digits known so far are soon few enough for the buffer, where
// the search goes on.
//
// rank_tile() gives each kept key its place. Two counts run along: keys that are certain to stay, and keys equal to the
// k-th, of which only the first few stay. Both are packed into one integer, so one scan serves both.
#pragma once

#include <climits>
#include <type_traits>

#include "common/float_bits.h"
#include "cuda/block.cuh"

namespace splade_fast::cuda::selection {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kBufferBytes = 45 << 10;  // with the rest a bit less than static shared memory may have
constexpr int kDigitBits = 8, kBins = 1 << kDigitBits;

template <typename Key>
constexpr int kCapacity = kBufferBytes / static_cast<int>(sizeof(Key) + sizeof(int32_t));

// Keys per thread, loaded together, between two agreements of the block on places.
template <typename Key>
constexpr int kItems = 32 / static_cast<int>(sizeof(Key));

template <typename Key>
constexpr int kTile = kThreads * kItems<Key>;

template <typename Key>
struct Shared {
  Key key[kCapacity<Key>];
  int32_t column[kCapacity<Key>];
  Key largest[kWarps];
  unsigned counts[2][kItems<Key> * kWarps];
  unsigned total[2];
  int histogram[kBins];
  int digit, agreeing, remaining;
};

// A key is kept for certain, or as one of several ties. One integer counts both: a tile has fewer than 2^16 keys.
constexpr unsigned kCertain = 1, kTie = 1 << 16;

struct Counts {
  int certain, ties;
};

// The keys above kth, and the first of those equal to it.
template <typename Key>
struct Cut {
  Key kth;
  int ties;  // number of keys equal to kth that stay

  __device__ unsigned kind(Key key) const { return key > kth ? kCertain : key == kth ? kTie : 0u; }
};

// Turns the kinds of a thread's keys of a tile, kind(0), kind(1) and so on, into the counts of all keys in front of
// each, and returns those of the tile. Turns alternate between 0 and 1, so that no tile waits until all threads have
// read the counts of the last.
template <typename Key, typename Kind>
__device__ unsigned rank_tile(Shared<Key>& shared, int turn, const Kind& kind, unsigned (&before)[kItems<Key>]) {
  constexpr int kPerLane = kItems<Key> * kWarps / kWarp;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const unsigned lower_lanes = (1u << lane) - 1;
#pragma unroll
  for (int j = 0; j < kItems<Key>; ++j) {
    const unsigned certain = __ballot_sync(kAllLanes, kind(j) == kCertain);
    const unsigned ties = __ballot_sync(kAllLanes, kind(j) == kTie);
    before[j] = __popc(certain & lower_lanes) * kCertain + __popc(ties & lower_lanes) * kTie;
    if (lane == 0) shared.counts[turn][j * kWarps + warp] = __popc(certain) * kCertain + __popc(ties) * kTie;
  }
  __syncthreads();
  if (warp == 0) {
    unsigned own[kPerLane], sum = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      own[j] = sum;
      sum += shared.counts[turn][lane * kPerLane + j];
    }
    const unsigned through = warp_inclusive_sum(sum);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) shared.counts[turn][lane * kPerLane + j] = through - sum + own[j];
    if (lane == kWarp - 1) shared.total[turn] = through;
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kItems<Key>; ++j) before[j] += shared.counts[turn][j * kWarps + warp];
  return shared.total[turn];
}

// Index of a thread's j-th key of a tile. Unsigned, since the last tile may extend past the largest int.
__device__ inline unsigned item(unsigned tile, int j) {
  return tile + static_cast<unsigned>(j * kThreads) + threadIdx.x;
}

// Keys 0 … count - 1 and the columns that they stand for.
template <typename Load>
struct Row {
  unsigned count;
  Load load;

  template <typename Key, int kCount>
  __device__ void load_tile(unsigned tile, Key (&key)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) key[j] = load(index(tile, j));
  }
  // Behind the end the last key again, so that all loads are unconditional and in flight together.
  __device__ int index(unsigned tile, int j) const { return static_cast<int>(min(item(tile, j), count - 1)); }
  __device__ int32_t column(int i) const { return i; }
};

template <typename Key>
struct Buffer {
  Shared<Key>& shared;
  unsigned count;

  template <int kCount>
  __device__ void load_tile(unsigned tile, Key (&key)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) key[j] = shared.key[index(tile, j)];
  }
  __device__ int index(unsigned tile, int j) const { return static_cast<int>(min(item(tile, j), count - 1)); }
  __device__ int32_t column(int i) const { return shared.column[i]; }
};

// Calls place(column, key, place) for the keys above the floor that the cut keeps; returns their number.
template <typename Key, typename Keys, typename Place>
__device__ int in_order(Shared<Key>& shared, const Keys& keys, Key floor, const Cut<Key>& cut, const Place& place) {
  Counts before{0, 0};
  int turn = 0;
  for (unsigned tile = 0; tile < keys.count; tile += kTile<Key>, turn ^= 1) {
    Key key[kItems<Key>];
    int32_t column[kItems<Key>];  // before others write to the buffer
    unsigned here[kItems<Key>];
    keys.load_tile(tile, key);
#pragma unroll
    for (int j = 0; j < kItems<Key>; ++j) column[j] = keys.column(keys.index(tile, j));
    const auto kind = [&](int j) { return item(tile, j) < keys.count && key[j] > floor ? cut.kind(key[j]) : 0u; };
    const unsigned total = rank_tile(shared, turn, kind, here);
#pragma unroll
    for (int j = 0; j < kItems<Key>; ++j) {
      const int ties = before.ties + static_cast<int>(here[j] / kTie);
      if (kind(j) == 0 || (kind(j) == kTie && ties >= cut.ties)) continue;
      place(column[j], key[j], before.certain + static_cast<int>(here[j] % kTie) + min(ties, cut.ties));
    }
    before.certain += static_cast<int>(total % kTie);
    before.ties += static_cast<int>(total / kTie);
  }
  return before.certain + min(before.ties, cut.ties);
}

// What a pass over a row has left in the buffer.
template <typename Key>
struct Collected {
  unsigned found;  // number of keys above the floor; more than the capacity if they did not fit
  Key largest;     // of this thread
};

template <typename Key, typename Keys>
__device__ Collected<Key> collect(Shared<Key>& shared, const Keys& row, int k, Key floor);

// The k-th largest of the keys above the floor, of which there are at least k, digit by digit. A row takes the place of
// what is in the buffer.
template <typename Key, typename Keys>
__device__ Cut<Key> find_kth(Shared<Key>& shared, const Keys& keys, int k, Key floor) {
  constexpr int kBits = 8 * sizeof(Key), kPerLane = kBins / kWarp;
  constexpr int kLoads = kItems<Key>;  // together
  const int lane = threadIdx.x % kWarp;
  Key prefix = 0;
  int remaining = k;
  for (int shift = kBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared.histogram[bin] = 0;
    __syncthreads();
    // The digits above this one. Two shifts, since a shift by all bits is undefined.
    const Key known = prefix >> shift >> kDigitBits;
    for (unsigned tile = 0; tile < keys.count; tile += kLoads * kThreads) {
      Key key[kLoads];
      keys.load_tile(tile, key);
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const bool is_counted = item(tile, j) < keys.count && key[j] > floor && key[j] >> shift >> kDigitBits == known;
        const int digit = is_counted ? static_cast<int>(key[j] >> shift) & (kBins - 1) : kBins;
        // Most leading digits are the same: one atomic serves all lanes that agree.
        const unsigned peers = __match_any_sync(kAllLanes, digit);
        if (is_counted && lane == __ffs(static_cast<int>(peers)) - 1) {
          atomicAdd(&shared.histogram[digit], __popc(peers));
        }
      }
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
      const int highest = kBins - 1 - lane * kPerLane;  // lane 0 has the largest digits
      int sum = 0;
      for (int j = 0; j < kPerLane; ++j) sum += shared.histogram[highest - j];
      const int through = warp_inclusive_sum(sum);
      int above = through - sum;
      if (above < remaining && through >= remaining) {
        int digit = highest;
        while (above + shared.histogram[digit] < remaining) above += shared.histogram[digit--];
        shared.digit = digit;
        shared.agreeing = shared.histogram[digit];
        shared.remaining = remaining - above;
      }
    }
    __syncthreads();
    prefix |= static_cast<Key>(shared.digit) << shift;
    remaining = shared.remaining;
    if constexpr (!std::is_same_v<Keys, Buffer<Key>>) {
      if (shift > 0 && shared.agreeing <= kCapacity<Key>) {
        const Key last = prefix | ((Key(1) << shift) - 1);
        const auto agreeing = [&](int i) {
          const Key key = keys.load(i);
          return key <= last ? key : Key(0);
        };
        if (prefix > floor) floor = prefix - 1;
        const Row<decltype(agreeing)> row{keys.count, agreeing};
        const Buffer<Key> buffer{shared, collect(shared, row, 0, floor).found};
        return find_kth(shared, buffer, remaining, Key(0));
      }
    }
  }
  return {prefix, remaining};
}

// The largest of the keys of all threads.
template <typename Key>
__device__ Key block_max(Shared<Key>& shared, Key key) {
  return block_reduce(key, shared.largest, [](Key a, Key b) { return a > b ? a : b; });
}

// Keeps the k largest keys of a buffer with more than k, in their order; returns the k-th. A key moves to the front, to
// a place that all threads have read.
template <typename Key>
__device__ Key shrink(Shared<Key>& shared, unsigned found, int k) {
  const Buffer<Key> buffer{shared, found};
  const Cut<Key> cut = find_kth(shared, buffer, k, Key(0));
  in_order(shared, buffer, Key(0), cut, [&](int32_t column, Key key, int place) {
    shared.key[place] = key;
    shared.column[place] = column;
  });
  __syncthreads();
  return cut.kth;
}

// Collects the k largest keys above the floor, and perhaps others, in order. k = 0: all that fit.
template <typename Key, typename Keys>
__device__ Collected<Key> collect(Shared<Key>& shared, const Keys& row, int k, Key floor) {
  const bool may_shrink = k > 0 && k <= kCapacity<Key> - kTile<Key>;
  Collected<Key> result{0, 0};
  int turn = 0;
  for (unsigned tile = 0; tile < row.count; turn ^= 1) {
    Key key[kItems<Key>];
    unsigned here[kItems<Key>];
    row.load_tile(tile, key);
    const auto kind = [&](int j) { return item(tile, j) < row.count && key[j] > floor ? kCertain : 0u; };
    const unsigned total = rank_tile(shared, turn, kind, here);
    if (may_shrink && result.found + total > kCapacity<Key>) {
      floor = shrink(shared, result.found, k);
      result.found = static_cast<unsigned>(k);
      continue;  // with the same tile
    }
#pragma unroll
    for (int j = 0; j < kItems<Key>; ++j) {
      if (kind(j) == 0) continue;
      result.largest = key[j] > result.largest ? key[j] : result.largest;
      const unsigned place = result.found + here[j];
      if (place >= kCapacity<Key>) continue;
      shared.key[place] = key[j];
      shared.column[place] = static_cast<int32_t>(item(tile, j));
    }
    result.found += total;
    tile += kTile<Key>;
  }
  __syncthreads();
  return result;
}

template <typename Key>
struct Selected {
  int count;
  Key kth;  // the k-th largest key above the floor; 0: there are not more than k
};

// Calls place(column, key, place) for those of the k largest keys above the floor that are at least at_least(largest
// key of this thread), which is the same for all threads, in order. load(i) returns key i of `count`. A place is not
// larger than the column, and all keys of its tile are read by then, so place() may write to the row.
template <typename Key, typename Load, typename AtLeast, typename Place>
__device__ Selected<Key> select_largest(Shared<Key>& shared, int count, int k, Key floor, const Load& load,
                                        const AtLeast& at_least, const Place& place) {
  const Row<Load> row{static_cast<unsigned>(count), load};
  const Collected<Key> collected = collect(shared, row, k, floor);
  const bool in_buffer = collected.found <= kCapacity<Key>;
  const Buffer<Key> buffer{shared, collected.found};
  Cut<Key> cut{0, INT_MAX};
  if (collected.found > static_cast<unsigned>(k)) {
    cut = in_buffer ? find_kth(shared, buffer, k, Key(0)) : find_kth(shared, row, k, floor);
  }
  const Key kth = cut.kth;
  // Keys above the k-th are among the k largest.
  const Key least = at_least(collected.largest);
  if (least > kth) cut = {least, INT_MAX};
  const int kept = in_buffer ? in_order(shared, buffer, Key(0), cut, place) : in_order(shared, row, floor, cut, place);
  return {kept, kth};
}

// Selects the k largest words in global memory, all different and at least k of them not 0, and sorts them, the largest
// first; returns where they are: in shared memory if they fit, else in place of the first words.
template <typename Key>
__device__ Key* sort_largest(Shared<Key>& shared, Key* words, int count, int k) {
  if (count > k) {
    select_largest(
        shared, count, k, Key(0), [&](int i) { return words[i]; }, [](Key) { return Key(0); },
        [&](int, Key word, int place) { words[place] = word; });
    __syncthreads();
  }
  if (k > kCapacity<Key>) {
    constexpr unsigned kChunk = 2048;
    static_assert(kChunk <= kCapacity<Key>);
    block_sort_in_chunks<kChunk>(words, static_cast<unsigned>(k), shared.key);
    return words;
  }
  for (int i = static_cast<int>(threadIdx.x); i < k; i += kThreads) shared.key[i] = words[i];
  __syncthreads();
  block_sort(shared.key, static_cast<unsigned>(k));
  return shared.key;
}

}  // namespace splade_fast::cuda::selection
