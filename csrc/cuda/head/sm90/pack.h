// Packs the rows of real tokens side by side, so that padded sequences with a mask cost their real tokens and the host
// does not wait for their number. Raw pointers of one device.
#pragma once

#include <cuda_runtime.h>

#include "cuda/device.cuh"

namespace splade_fast::cuda {

struct PackTask {
  Sequences sequences;  // of the padded rows; at most INT32_MAX rows
  int64_t batch;
  const bool* mask;  // (rows,), true for real tokens, at a multiple of 16; null: all are real, and rows stay in place
  const void* rows;  // of row_bytes each, a multiple of 16, at a multiple of 16
  int64_t row_bytes;

  int32_t* starts;  // (batch + 1,), starts of the sequences among the packed rows
  // (tiles of kTileTokens packed rows,), the sequence with which the walk over the segments of each tile begins. Only
  // those of tiles with rows are written.
  int32_t* first_sequences;
  int32_t* source_rows;  // (rows,), padded row of each packed row; only with a mask
  // (rows, row_bytes), only with a mask. starts[batch] rows are written, then zeros to the end of the last tile, since
  // the product reads whole tiles.
  void* packed;
  uint4* zeros;  // (zero_vectors,), set to 0 for the launches behind
  int64_t zero_vectors;
};

cudaError_t launch_pack(const PackTask& task, int64_t multiprocessors, cudaStream_t stream);

}  // namespace splade_fast::cuda
