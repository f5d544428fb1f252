// Reductions, scans and sorting by a whole block; all threads take part. A result does not depend on the order in which
// warps run.
//
// The caller gives shared memory with an element for each warp. It may be used again as soon as a function returns.
#pragma once

#include "cuda/warp.cuh"

namespace splade_fast::cuda {

// Returns the values of all threads, combined, to every thread: first in each warp, then warp by warp. warps: of the
// block, where it may have fewer than there is memory for.
template <typename Value, int kWarps, typename Combine>
__device__ Value block_reduce(Value value, Value (&of_warps)[kWarps], const Combine& combine, int warps = kWarps) {
  value = warp_reduce(value, combine);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  Value result = of_warps[0];
#pragma unroll(sizeof(Value) > 8 ? 1 : kWarps)  // large values together would take many registers
  for (int warp = 1; warp < warps; ++warp) result = combine(result, of_warps[warp]);
  __syncthreads();
  return result;
}

template <typename Value>
struct Sums {
  Value before, total;  // of the threads before this one, and of all
};

template <typename Value, int kWarps>
__device__ Sums<Value> block_sums(Value value, Value (&of_warps)[kWarps]) {
  const int own = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const Value through = warp_inclusive_sum(value);
  if (lane == kWarp - 1) of_warps[own] = through;
  __syncthreads();
  Sums<Value> sums{through - value, Value(0)};
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp < own) sums.before += of_warps[warp];
    sums.total += of_warps[warp];
  }
  __syncthreads();
  return sums;
}

// Sorts words in shared or global memory, the largest first. The caller has synchronised the block behind what wrote
// them, and all threads see the result.
//
// Runs of 2, 4, 8, ... words are merged in place: the first step compares each word of a run with its mirror image in
// the other half, the further ones (`distance` apart) sort either half. Every comparison moves the larger word to the
// front, so the words that are missing behind the end count as the smallest and need not exist.
template <typename Word>
__device__ void sort_step(Word* words, unsigned count, unsigned distance, bool mirrors) {
  for (unsigned pair = threadIdx.x;; pair += blockDim.x) {
    const unsigned front = 2 * pair - (pair & (distance - 1));
    if (front >= count) break;
    const unsigned back = mirrors ? front ^ (2 * distance - 1) : front + distance;
    if (back < count && words[front] < words[back]) {
      const Word larger = words[back];
      words[back] = words[front];
      words[front] = larger;
    }
  }
  __syncthreads();
}

template <typename Word>
__device__ void sort_halves(Word* words, unsigned count, unsigned distance) {
  for (; distance > 0; distance /= 2) sort_step(words, count, distance, false);
}

template <typename Word>
__device__ void block_sort(Word* words, unsigned count) {
  for (unsigned half = 1; half < count; half *= 2) {
    sort_step(words, count, half, true);
    sort_halves(words, count, half / 2);
  }
}

// The same for words in global memory, with a chunk of shared memory, a power of two. Only steps between words further
// apart than a chunk work in global memory.
template <unsigned kChunk, typename Word>
__device__ void block_sort_in_chunks(Word* words, unsigned count, Word* chunk) {
  static_assert((kChunk & (kChunk - 1)) == 0);
  const auto for_each_chunk = [&](const auto& sort) {
    for (unsigned first = 0; first < count; first += kChunk) {
      const unsigned size = min(kChunk, count - first);
      for (unsigned i = threadIdx.x; i < size; i += blockDim.x) chunk[i] = words[first + i];
      __syncthreads();
      sort(size);
      for (unsigned i = threadIdx.x; i < size; i += blockDim.x) words[first + i] = chunk[i];
      __syncthreads();
    }
  };
  for_each_chunk([&](unsigned size) { block_sort(chunk, size); });
  for (unsigned half = kChunk; half < count; half *= 2) {
    sort_step(words, count, half, true);
    for (unsigned distance = half / 2; distance >= kChunk; distance /= 2) sort_step(words, count, distance, false);
    for_each_chunk([&](unsigned size) { sort_halves(chunk, size, kChunk / 2); });
  }
}

}  // namespace splade_fast::cuda
