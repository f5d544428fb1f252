// Merges a key into memory by maximum, in any order of threads.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace splade_fast::cuda {

template <typename K>
__device__ inline void merge_key(K* key, K candidate) {
  if constexpr (sizeof(K) == 8) {
    atomicMax(reinterpret_cast<unsigned long long*>(key), static_cast<unsigned long long>(candidate));
  } else {
    atomicMax(key, candidate);
  }
}

}  // namespace splade_fast::cuda
