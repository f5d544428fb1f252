// The fused head forward for max pooling on sm_90a: when it can run, what it needs, and its launch. Raw pointers of one
// device; nothing here knows torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "head_sm90_tiles.h"
#include "pooled.cuh"

namespace splade_fast::cuda::sm90 {

struct HeadTask {
  Shape shape;  // rows: that tokens has room for
  hopper::Operand operand;
  const void* tokens;  // (rows, depth), of which starts[batch] are read
  const void* weight;  // (vocabulary, depth)
  PackedRows rows;
  int32_t* first_sequences;  // (token tiles,), filled by the launch
  void* keys;                // key_bytes(), filled by the launch
  PooledOutputs outputs;     // in the type of the operands, float for TF32 and e4m3
  // What e4m3 operands were divided by: of each sequence and each entry.
  const float *sequence_scales, *entry_scales;
};

// Whether the library has machine code for sm_90a.
bool is_built();

cudaError_t launch_head(const HeadTask& task, cudaStream_t stream);

}  // namespace splade_fast::cuda::sm90
