// The k largest of a row of keys, in order, by one block. Of equal keys the first stay.
//
// A pass collects the keys above a floor in shared memory. When the buffer is full, a radix selection finds the k-th
// largest key in it; the k largest stay, and the k-th becomes the floor, since a later equal key loses the tie. So a
// row costs one pass, whatever it holds. For a k that leaves the buffer no room for a tile of keys, further passes over
// the row select instead.
#pragma once

#include <climits>

#include "common/float_bits.h"
#include "cuda/warp.cuh"

namespace splade_fast::cuda::selection {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kBufferBytes = 45 << 10;  // with the rest a bit less than static shared memory may have
constexpr int kDigitBits = 8, kBins = 1 << kDigitBits;

template <typename Acc>
constexpr int kCapacity = kBufferBytes / static_cast<int>(sizeof(OrderedKey<Acc>) + sizeof(int32_t));

// Keys per thread, loaded together, between two agreements of the block on places.
template <typename Acc>
constexpr int kItems = sizeof(Acc) == 8 ? 4 : 8;

template <typename Acc>
constexpr int kTile = kThreads * kItems<Acc>;

template <typename Acc>
struct Shared {
  OrderedKey<Acc> key[kCapacity<Acc>];
  int32_t column[kCapacity<Acc>];
  OrderedKey<Acc> largest[kWarps];
  unsigned counts[2][kItems<Acc> * kWarps];
  unsigned total[2];
  int histogram[kBins];
  int digit, remaining;
};

// A key is kept for certain, or as one of several ties. One integer counts both: a tile has fewer than 2^16 keys.
constexpr unsigned kCertain = 1, kTie = 1 << 16;

struct Counts {
  int certain, ties;
};

// The keys above kth, and the first of those equal to it.
template <typename Acc>
struct Cut {
  OrderedKey<Acc> kth;
  int ties;  // number of keys equal to kth that stay

  __device__ unsigned kind(OrderedKey<Acc> key) const { return key > kth ? kCertain : key == kth ? kTie : 0u; }
};

// Turns the kinds of a thread's keys of a tile, kind(0), kind(1) and so on, into the counts of all keys in front of
// each, and returns those of the tile. Turns alternate between 0 and 1, so that no tile waits until all threads have
// read the counts of the last.
template <typename Acc, typename Kind>
__device__ unsigned rank_tile(Shared<Acc>& shared, int turn, const Kind& kind, unsigned (&before)[kItems<Acc>]) {
  constexpr int kPerLane = kItems<Acc> * kWarps / kWarp;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const unsigned lower_lanes = (1u << lane) - 1;
#pragma unroll
  for (int j = 0; j < kItems<Acc>; ++j) {
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
    unsigned through = sum;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const unsigned other = __shfl_up_sync(kAllLanes, through, step);
      if (lane >= step) through += other;
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) shared.counts[turn][lane * kPerLane + j] = through - sum + own[j];
    if (lane == kWarp - 1) shared.total[turn] = through;
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kItems<Acc>; ++j) before[j] += shared.counts[turn][j * kWarps + warp];
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

template <typename Acc>
struct Buffer {
  Shared<Acc>& shared;
  unsigned count;

  template <int kCount>
  __device__ void load_tile(unsigned tile, OrderedKey<Acc> (&key)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) key[j] = shared.key[index(tile, j)];
  }
  __device__ int index(unsigned tile, int j) const { return static_cast<int>(min(item(tile, j), count - 1)); }
  __device__ int32_t column(int i) const { return shared.column[i]; }
};

// Calls place(column, key, place) for the keys above the floor that the cut keeps; returns their number.
template <typename Acc, typename Keys, typename Place>
__device__ int in_order(Shared<Acc>& shared, const Keys& keys, OrderedKey<Acc> floor, const Cut<Acc>& cut,
                        const Place& place) {
  Counts before{0, 0};
  int turn = 0;
  for (unsigned tile = 0; tile < keys.count; tile += kTile<Acc>, turn ^= 1) {
    OrderedKey<Acc> key[kItems<Acc>];
    int32_t column[kItems<Acc>];  // before others write to the buffer
    unsigned here[kItems<Acc>];
    keys.load_tile(tile, key);
#pragma unroll
    for (int j = 0; j < kItems<Acc>; ++j) column[j] = keys.column(keys.index(tile, j));
    const auto kind = [&](int j) { return item(tile, j) < keys.count && key[j] > floor ? cut.kind(key[j]) : 0u; };
    const unsigned total = rank_tile(shared, turn, kind, here);
#pragma unroll
    for (int j = 0; j < kItems<Acc>; ++j) {
      const int ties = before.ties + static_cast<int>(here[j] / kTie);
      if (kind(j) == 0 || (kind(j) == kTie && ties >= cut.ties)) continue;
      place(column[j], key[j], before.certain + static_cast<int>(here[j] % kTie) + min(ties, cut.ties));
    }
    before.certain += static_cast<int>(total % kTie);
    before.ties += static_cast<int>(total / kTie);
  }
  return before.certain + min(before.ties, cut.ties);
}

// The k-th largest of the keys above the floor, of which there are at least k, digit by digit.
template <typename Acc, typename Keys>
__device__ Cut<Acc> find_kth(Shared<Acc>& shared, const Keys& keys, int k, OrderedKey<Acc> floor) {
  constexpr int kBits = 8 * sizeof(OrderedKey<Acc>), kPerLane = kBins / kWarp;
  constexpr int kLoads = 4;  // together
  const int lane = threadIdx.x % kWarp;
  OrderedKey<Acc> prefix = 0;
  int remaining = k;
  for (int shift = kBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared.histogram[bin] = 0;
    __syncthreads();
    // The digits above this one. Two shifts, since a shift by all bits is undefined.
    const OrderedKey<Acc> known = prefix >> shift >> kDigitBits;
    for (unsigned tile = 0; tile < keys.count; tile += kLoads * kThreads) {
      OrderedKey<Acc> key[kLoads];
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
      int through = sum;
      for (int step = 1; step < kWarp; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, through, step);
        if (lane >= step) through += other;
      }
      int above = through - sum;
      if (above < remaining && through >= remaining) {
        int digit = highest;
        while (above + shared.histogram[digit] < remaining) above += shared.histogram[digit--];
        shared.digit = digit;
        shared.remaining = remaining - above;
      }
    }
    __syncthreads();
    prefix |= static_cast<OrderedKey<Acc>>(shared.digit) << shift;
    remaining = shared.remaining;
  }
  return {prefix, remaining};
}

template <typename Acc>
__device__ OrderedKey<Acc> block_max(Shared<Acc>& shared, OrderedKey<Acc> key) {
  for (int step = kWarp / 2; step > 0; step /= 2) key = max(key, __shfl_xor_sync(kAllLanes, key, step));
  if (threadIdx.x % kWarp == 0) shared.largest[threadIdx.x / kWarp] = key;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) key = max(key, shared.largest[warp]);
  return key;
}

// Keeps the k largest keys of a buffer with more than k, in their order; returns the k-th. A key moves to the front, to
// a place that all threads have read.
template <typename Acc>
__device__ OrderedKey<Acc> shrink(Shared<Acc>& shared, unsigned found, int k) {
  const Buffer<Acc> buffer{shared, found};
  const Cut<Acc> cut = find_kth(shared, buffer, k, OrderedKey<Acc>(0));
  in_order(shared, buffer, OrderedKey<Acc>(0), cut, [&](int32_t column, OrderedKey<Acc> key, int place) {
    shared.key[place] = key;
    shared.column[place] = column;
  });
  __syncthreads();
  return cut.kth;
}

// What a pass over a row has left in the buffer.
template <typename Acc>
struct Collected {
  unsigned found;           // number of keys above the floor; more than the capacity if they did not fit
  OrderedKey<Acc> largest;  // of this thread
};

// Collects the k largest keys above the floor, and perhaps others, in order.
template <typename Acc, typename Keys>
__device__ Collected<Acc> collect(Shared<Acc>& shared, const Keys& row, int k, OrderedKey<Acc> floor) {
  const bool may_shrink = k > 0 && k <= kCapacity<Acc> - kTile<Acc>;
  Collected<Acc> result{0, 0};
  int turn = 0;
  for (unsigned tile = 0; tile < row.count; turn ^= 1) {
    OrderedKey<Acc> key[kItems<Acc>];
    unsigned here[kItems<Acc>];
    row.load_tile(tile, key);
    const auto kind = [&](int j) { return item(tile, j) < row.count && key[j] > floor ? kCertain : 0u; };
    const unsigned total = rank_tile(shared, turn, kind, here);
    if (may_shrink && result.found + total > kCapacity<Acc>) {
      floor = shrink(shared, result.found, k);
      result.found = static_cast<unsigned>(k);
      continue;  // with the same tile
    }
#pragma unroll
    for (int j = 0; j < kItems<Acc>; ++j) {
      if (kind(j) == 0) continue;
      result.largest = max(result.largest, key[j]);
      const unsigned place = result.found + here[j];
      if (place >= kCapacity<Acc>) continue;
      shared.key[place] = key[j];
      shared.column[place] = static_cast<int32_t>(item(tile, j));
    }
    result.found += total;
    tile += kTile<Acc>;
  }
  __syncthreads();
  return result;
}

// Calls place(column, place) for those of the k largest keys above the floor that are at least at_least(largest key of
// this thread), which is the same for all threads, in order; returns their number. load(i) returns key i of `count`.
template <typename Acc, typename Load, typename AtLeast, typename Place>
__device__ int select_largest(Shared<Acc>& shared, int count, int k, OrderedKey<Acc> floor, const Load& load,
                              const AtLeast& at_least, const Place& place) {
  const Row<Load> row{static_cast<unsigned>(count), load};
  const Collected<Acc> collected = collect(shared, row, k, floor);
  const bool in_buffer = collected.found <= kCapacity<Acc>;
  const Buffer<Acc> buffer{shared, collected.found};
  Cut<Acc> cut{0, INT_MAX};
  if (collected.found > static_cast<unsigned>(k)) {
    cut = in_buffer ? find_kth(shared, buffer, k, OrderedKey<Acc>(0)) : find_kth(shared, row, k, floor);
  }
  // Keys above the k-th are among the k largest.
  const OrderedKey<Acc> least = at_least(collected.largest);
  if (least > cut.kth) cut = {least, INT_MAX};
  const auto place_column = [&](int32_t column, OrderedKey<Acc>, int target) { place(column, target); };
  return in_buffer ? in_order(shared, buffer, OrderedKey<Acc>(0), cut, place_column)
                   : in_order(shared, row, floor, cut, place_column);
}

}  // namespace splade_fast::cuda::selection
