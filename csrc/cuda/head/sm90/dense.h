// The dense head forward for max pooling on sm_90a: its task and its launch. Raw pointers of one device; independent of
// torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/head/sm90/tiles.h"
#include "cuda/pooled.cuh"

namespace splade_fast::cuda::sm90 {

// A condition on a count of earlier kernels: more than a limit. Without a count the condition holds.
struct OnlyIf {
  const unsigned long long* count;
  unsigned long long more_than;

  __device__ bool holds() const { return count == nullptr || *count > more_than; }
};

struct HeadTask {
  Shape shape;  // rows: capacity of tokens
  hopper::Operand operand;
  const void* tokens;  // (rows, dim), of which starts[batch] are read
  const void* weight;  // (vocabulary, dim)
  PackedRows rows;
  int32_t* first_sequences;  // (token tiles,), filled by the launch
  void* keys;                // key_bytes(), filled by the launch
  bool keys_are_zero;        // before the launch
  PooledOutputs outputs;     // in the type of the operands, float for TF32
  OnlyIf only_if;            // evaluated on the device when the launch begins; nothing is written unless it holds
};

// Whether the library has machine code for sm_90a.
bool is_built();

cudaError_t launch_head(const HeadTask& task, cudaStream_t stream);

}  // namespace splade_fast::cuda::sm90
