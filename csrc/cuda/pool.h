// The reducing kernel of pool, which head also runs on every chunk of its logits.
#pragma once

#include "cuda/common.cuh"
#include "cuda/pooled.cuh"

namespace splade_fast::cuda {

// The running result of the one sequence that a block of rows cuts in two.
struct PoolCarry {
  void* value;        // (columns,) in the accumulation type
  int32_t* position;  // (columns,); -1: no real token so far; max pooling only
};

// Some columns of some rows of logits, reduced over the rows of each sequence.
struct PoolTask : PooledOutputs {
  // Row l of sequence b: logits + offset(b) + (l - first_row) * row_stride, where offset(b) is b * sequence_stride, or
  // for packed rows starts[b] * row_stride.
  const void* logits;
  int64_t sequence_stride, row_stride;
  int64_t columns;
  int64_t readable;            // >= columns: number of readable elements of a row
  int64_t first_row, end_row;  // rows in logits, among the rows of all sequences
  Sequences sequences;
  int64_t first_sequence, num_sequences;  // sequences with rows here
  const bool* mask;                       // (B, L), or null
  PoolCarry carry_in, carry_out;          // used where a sequence is cut
};

// dtype: of logits and bias.
void pool_rows(const PoolTask& task, ScalarType dtype, Pooling pooling, const OnDevice& device, const char* op);

}  // namespace splade_fast::cuda
