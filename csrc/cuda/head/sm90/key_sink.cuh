// Where the kernels of the head on sm_90a put maxima: outputs, and keys in memory that merge the maxima of several
// tiles or threads. tiles.h explains keys.
#pragma once

#include "cuda/head/sm90/tiles.h"
#include "cuda/pooled.cuh"

namespace splade_fast::cuda::sm90 {

// Merges a key into memory by maximum, in any order of threads.
template <typename K>
__device__ inline void merge_key(K* key, K candidate) {
  if constexpr (sizeof(K) == 8) {
    atomicMax(reinterpret_cast<unsigned long long*>(key), static_cast<unsigned long long>(candidate));
  } else {
    atomicMax(key, candidate);
  }
}

// Outputs in the type T, and rows of keys, one for each slot.
template <typename T, bool kPositions>
struct KeySink {
  const PooledOutputs& outputs;
  void* keys;
  int64_t vocabulary;

  __device__ MaxKey<kPositions>* key(int slot, int64_t entry) const {
    return static_cast<MaxKey<kPositions>*>(keys) + slot * vocabulary + entry;
  }
  __device__ void store(int sequence, int64_t entry, float value, int position, bool has_real_token) {
    store_maximum<T>(outputs, sequence, entry, value, position, has_real_token);
  }
  __device__ void merge(int slot, int64_t entry, MaxKey<kPositions> candidate) {
    merge_key(key(slot, entry), candidate);
  }
  __device__ MaxKey<kPositions> merged(int slot, int64_t entry) const { return *key(slot, entry); }
};

}  // namespace splade_fast::cuda::sm90
