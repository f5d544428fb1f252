// The outputs of max pooling, for every kernel that finds maxima.
#pragma once

#include "cuda/device.cuh"

namespace splade_fast::cuda {

// Outputs (B, vocabulary), from the first column of the writer on. Maxima and their positions: null if not wanted.
struct PooledOutputs {
  int64_t vocabulary;
  void* pooled;
  bool pooled_in_acc;
  void* max_logits;
  void* positions;
  int position_bytes;
  const void* bias;  // of these columns, or null
  Activation activation;
};

// Adds the bias to a finished maximum, applies the activation and stores both. A sequence without real tokens keeps
// -inf, whatever the bias.
template <typename T>
__device__ void store_maximum(const PooledOutputs& outputs, int64_t b, int64_t column, Accumulator<T> value,
                              int32_t position, bool has_real_token) {
  const int64_t index = b * outputs.vocabulary + column;
  if (outputs.bias != nullptr && has_real_token) value += to_acc(static_cast<const T*>(outputs.bias)[column]);
  store_either<T>(outputs.pooled, outputs.pooled_in_acc, index, activate(value, outputs.activation));
  if (outputs.max_logits != nullptr) {
    static_cast<Accumulator<T>*>(outputs.max_logits)[index] = value;
    store_position(outputs.positions, outputs.position_bytes, index, position);
  }
}

}  // namespace splade_fast::cuda
