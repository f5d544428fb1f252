// Reductions and scans of a whole warp; all lanes take part.
#pragma once

#include <cuda_runtime.h>

namespace splade_fast::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The value of the lane whose number differs in these bits. A struct has an overload of its own.
template <typename Value>
__device__ inline Value shuffle_xor(Value value, int lanes) {
  return __shfl_xor_sync(kAllLanes, value, lanes);
}

// Returns the values of all lanes, combined, to every lane. combine(a, b) = combine(b, a), so every lane gets the same
// bits, always in the same order.
template <typename Value, typename Combine>
__device__ inline Value warp_reduce(Value value, const Combine& combine) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = combine(value, shuffle_xor(value, step));
  return value;
}

template <typename Value>
__device__ inline Value warp_sum(Value value) {
  return warp_reduce(value, [](Value a, Value b) { return a + b; });
}

__device__ inline float warp_max(float value) {
  return warp_reduce(value, [](float a, float b) { return fmaxf(a, b); });
}

// Returns the sum of the values of the lanes up to this one.
template <typename Value>
__device__ inline Value warp_inclusive_sum(Value value) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const Value before = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += before;
  }
  return value;
}

}  // namespace splade_fast::cuda
