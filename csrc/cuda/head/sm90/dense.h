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
  const int32_t* first_sequences;  // (token tiles,)
  void* keys;                      // of key_bytes()
  PooledOutputs outputs;           // in the type of the operands, float for TF32
  OnlyIf only_if;                  // evaluated on the device when a kernel begins; it writes nothing unless this holds
};

// Whether the library has machine code for sm_90a.
bool is_built();

// Computes all results. The keys are 0 before the launch.
cudaError_t launch_head(const HeadTask& task, cudaStream_t stream);

// Computes the results of sequences that lie in one tile. Those of others stay as keys, which are 0 before the launch:
// store_remaining() in tiles.h.
cudaError_t launch_head_tiles(const HeadTask& task, cudaStream_t stream);

}  // namespace splade_fast::cuda::sm90
