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
__device__ void block_sort(Word* words, unsigned count) {
  for (unsigned run = 2; run / 2 < count; run *= 2) {
    for (unsigned distance = run / 2; distance > 0; distance /= 2) {
      for (unsigned pair = threadIdx.x;; pair += blockDim.x) {
        const unsigned front = 2 * pair - (pair & (distance - 1));
        if (front >= count) break;
        const unsigned back = distance == run / 2 ? front ^ (run - 1) : front + distance;
        if (back < count && words[front] < words[back]) {
          const Word larger = words[back];
          words[back] = words[front];
          words[front] = larger;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace splade_fast::cuda
