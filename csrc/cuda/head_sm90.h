// The fused head forward for max pooling on sm_90a: when it can run, what it needs, and its launch. Raw pointers of one
// device; nothing here knows torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "head_sm90_tiles.h"
#include "pooled.cuh"

namespace splade_fast::cuda::sm90 {

struct HeadTask {
  Shape shape;                 // rows: that tokens has room for
  bool is_bfloat16;            // or float16
  const void* tokens;          // (rows, depth), of which starts[batch] are read
  const void* weight;          // (vocabulary, depth)
  const int32_t* starts;       // (batch + 1,)
  const int32_t* source_rows;  // (rows,): of the rows of a padded batch, or null: positions are counted from the start
  int64_t length;              // of a padded sequence; only with source_rows
  int32_t* first_sequences;    // (token tiles,), filled by the launch
  void* keys;  // (key_slots, vocabulary), filled by the launch: 8 bytes each if positions are wanted, else 4
  PooledOutputs outputs;
};

// Whether the library has machine code for sm_90a.
bool is_built();

cudaError_t launch_head(const HeadTask& task, cudaStream_t stream);

}  // namespace splade_fast::cuda::sm90
