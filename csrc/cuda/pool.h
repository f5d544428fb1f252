// The reducing kernel of pool, which head also runs on every chunk of its logits.
//
// The rows of all sequences stand one below the other. A task has some columns of the rows [first_row, end_row) of
// them:
//
//    sequence 0    .. .. .. ..
//    sequence 1    .. .. .. ..     rows of an earlier task
//              ----------------- first_row: carry_in has the result of the rows of sequence 1 above
//    sequence 1    xx xx xx xx     first_sequence = 1: its row l is at offset(1) + (l - first_row) * row_stride
//    sequence 2    xx xx xx xx     num_sequences = 3
//    sequence 3    xx xx xx xx
//              ----------------- end_row: carry_out gets the result of the rows of sequence 3 so far
//    sequence 3    .. .. .. ..     rows of a later task
//
// So at most one sequence comes in and one goes on. Sequence 2 lies within the task and is stored in the outputs, and
// so is sequence 1, which ends here. pool has one task with all rows and columns; head has one for each chunk.
#pragma once

#include "cuda/common.cuh"
#include "cuda/pooled.cuh"

namespace splade_fast::cuda {

// The running result of the one sequence that a block of rows cuts in two.
struct PoolCarry {
  void* value;        // (columns,) in the accumulation type
  int32_t* position;  // (columns,); -1: no real token so far; max pooling only
};

struct PoolTask : PooledOutputs {
  // Where the logits are. Row l of sequence b: logits + offset(b) + (l - first_row) * row_stride, where offset(b) is
  // b * sequence_stride, or for packed rows starts[b] * row_stride.
  const void* logits;
  int64_t sequence_stride, row_stride;
  int64_t columns;
  int64_t readable;  // >= columns: number of readable elements of a row

  // Which rows they are, and of which sequences.
  int64_t first_row, end_row;
  Sequences sequences;
  int64_t first_sequence, num_sequences;  // sequences with rows here
  const bool* mask;                       // (B, L), or null

  PoolCarry carry_in, carry_out;  // used where a sequence is cut
};

// dtype: of logits and bias.
void pool_rows(const PoolTask& task, ScalarType dtype, Pooling pooling, const OnDevice& device, const char* op);

}  // namespace splade_fast::cuda
