// The fused head forward for max pooling on sm_90a: when it can run, what it needs, and its launch. Raw pointers of one
// device; nothing here knows torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/head/sm90/tiles.h"
#include "cuda/pooled.cuh"

namespace splade_fast::cuda::sm90 {

// Something that kernels before have counted: more of it than this. Without a count it holds.
struct OnlyIf {
  const unsigned long long* count;
  unsigned long long more_than;

  __device__ bool holds() const { return count == nullptr || *count > more_than; }
};

struct HeadTask {
  Shape shape;  // rows: that tokens has room for
  hopper::Operand operand;
  const void* tokens;  // (rows, depth), of which starts[batch] are read
  const void* weight;  // (vocabulary, depth)
  PackedRows rows;
  int32_t* first_sequences;  // (token tiles,), filled by the launch
  void* keys;                // key_bytes(), filled by the launch
  bool keys_are_zero;        // already
  PooledOutputs outputs;     // in the type of the operands, float for TF32
  OnlyIf only_if;            // on the device, when the launch begins: nothing is written unless this holds
};

// Whether the library has machine code for sm_90a.
bool is_built();

cudaError_t launch_head(const HeadTask& task, cudaStream_t stream);

}  // namespace splade_fast::cuda::sm90
