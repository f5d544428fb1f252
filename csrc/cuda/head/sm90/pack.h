// Rows that count, side by side: padded sequences with a mask cost their real tokens, and the host need not wait to
// learn how many they are. Raw pointers of one device throughout.
#pragma once

#include <cuda_runtime.h>

#include "cuda/device.cuh"

namespace splade_fast::cuda {

struct PackTask {
  Sequences sequences;  // of the rows as given; at most INT32_MAX rows
  int64_t batch;
  const bool* mask;  // (rows,): those that count; null: all, and rows stay where they are
  const void* rows;  // row_bytes each, a multiple of 16, at an address that is one too
  int64_t row_bytes;

  int32_t* starts;       // (batch + 1,): of the sequences among the packed rows
  int32_t* source_rows;  // (rows,): which row a packed row was; only with a mask
  void* packed;          // (rows, row_bytes), of which the first starts[batch] are written; only with a mask
};

cudaError_t launch_pack(const PackTask& task, int64_t multiprocessors, cudaStream_t stream);

}  // namespace splade_fast::cuda
