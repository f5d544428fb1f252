// The launch that packs: code of the kernels in pack.cu and screen_rows.cu, and its grid.
//
// With a mask, a few blocks share a sequence, or a block takes some. Each counts the real tokens in front of its first
// one in the mask: at most a byte a token, which costs less than a launch that adds them up once.
#pragma once

#include "cuda/block.cuh"
#include "cuda/head/sm90/pack.h"
#include "cuda/head/sm90/tiles.h"

namespace splade_fast::cuda::packing {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

struct Grid {
  unsigned blocks;
  int parts;  // blocks for the same sequences, with a mask
};

inline Grid grid_of(const PackTask& task, int64_t multiprocessors) {
  constexpr int64_t kBlocksPerMultiprocessor = 4;
  const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t most = multiprocessors * kBlocksPerMultiprocessor;
  if (task.mask != nullptr) {
    const int64_t groups = smaller(task.batch, most);
    const int64_t parts = smaller(ceil_div(most, groups), ceil_div(task.sequences.length, kWarps));
    return {static_cast<unsigned>(groups * parts), static_cast<int>(parts)};
  }
  const int64_t warps = task.sequences.rows + ceil_div(task.zero_vectors, kWarp);
  return {static_cast<unsigned>(smaller(ceil_div(warps, kWarps), most)), 0};
}

// The warp among all of the grid, and their number.
__device__ inline int64_t warp_of_grid() { return (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; }
__device__ inline int64_t warps_of_grid() { return static_cast<int64_t>(gridDim.x) * kWarps; }

// Returns the number of real tokens among the first `end`.
__device__ inline int count_real(const bool* mask, int64_t end, int (&counts)[kWarps]) {
  const int64_t vectors = end / kVectorBytes;
  int count = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    const uint4 flags = reinterpret_cast<const uint4*>(mask)[i];  // a bit for each true
    count += __popc(flags.x) + __popc(flags.y) + __popc(flags.z) + __popc(flags.w);
  }
  for (int64_t i = vectors * kVectorBytes + threadIdx.x; i < end; i += kThreads) count += mask[i];
  return block_sums(count, counts).total;
}

// A warp moves a row, with a few loads of each lane in flight together.
__device__ inline void move_row(const PackTask& task, int64_t from, int64_t to) {
  constexpr int kTogether = 4;
  const int64_t vectors = task.row_bytes / kVectorBytes;
  const uint4* source = static_cast<const uint4*>(task.rows) + from * vectors;
  uint4* target = static_cast<uint4*>(task.packed) + to * vectors;
  for (int64_t first = threadIdx.x % kWarp; first < vectors; first += kTogether * kWarp) {
    uint4 part[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i * kWarp < vectors) part[i] = source[first + i * kWarp];
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i * kWarp < vectors) target[first + i * kWarp] = part[i];
    }
  }
}

// The rows of a tile behind the last one become zero. A block of `parts`.
__device__ inline void clear_rest_of_tile(const PackTask& task, int64_t count, int part, int parts) {
  const int64_t vectors = task.row_bytes / kVectorBytes;
  const int64_t end = min(round_up(count, sm90::kTileTokens), task.sequences.rows);
  for (int64_t row = count + part * kWarps + threadIdx.x / kWarp; row < end; row += parts * kWarps) {
    uint4* target = static_cast<uint4*>(task.packed) + row * vectors;
    for (int64_t i = threadIdx.x % kWarp; i < vectors; i += kWarp) target[i] = uint4{};
  }
}

// Packs a sequence behind `start` rows of others and returns their number with its own. Each of `parts` blocks numbers
// all of its real tokens, kThreads at a time, and its warps take every so many of them: move(row, packed row).
template <typename Move>
__device__ int pack_sequence(const PackTask& task, int64_t b, int start, int part, int parts, int (&counts)[kWarps],
                             const Move& move) {
  __shared__ int32_t rows[kThreads];
  const int64_t length = task.sequences.length;
  const int mover = part * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  int stop = start;
  for (int64_t first = 0; first < length; first += kThreads) {
    const int64_t l = first + threadIdx.x, row = b * length + l;
    const bool is_real = l < length && task.mask[row];
    const Sums<int> real = block_sums(static_cast<int>(is_real), counts);
    if (is_real) rows[real.before] = static_cast<int32_t>(row);
    __syncthreads();
    for (int i = mover; i < real.total; i += parts * kWarps) {
      move(rows[i], static_cast<int64_t>(stop) + i);
      if (threadIdx.x % kWarp == 0) task.source_rows[stop + i] = rows[i];
    }
    stop += real.total;
  }
  if (part > 0) return stop;
  if (threadIdx.x == 0) task.starts[b + 1] = stop;
  // The tiles that begin in this sequence.
  for (int64_t tile = ceil_div(start, sm90::kTileTokens) + threadIdx.x; tile * sm90::kTileTokens < stop;
       tile += kThreads) {
    task.first_sequences[tile] = static_cast<int32_t>(b);
  }
  return stop;
}

template <typename Move>
__device__ void pack_padded(const PackTask& task, int parts, const Move& move) {
  __shared__ int counts[kWarps];
  const int64_t per_group = ceil_div(task.batch, static_cast<int64_t>(gridDim.x) / parts);
  const int64_t begin = blockIdx.x / parts * per_group, end = min(begin + per_group, task.batch);
  const int part = static_cast<int>(blockIdx.x % parts);
  if (begin >= end) return;
  int count = count_real(task.mask, begin * task.sequences.length, counts);
  for (int64_t b = begin; b < end; ++b) count = pack_sequence(task, b, count, part, parts, counts, move);
  if (end == task.batch) clear_rest_of_tile(task, count, part, parts);
  if (blockIdx.x == 0 && threadIdx.x == 0) task.starts[0] = 0;
}

// For rows that stay in place, by one block. Their starts may have any values.
__device__ inline void plan_packed(const PackTask& task) {
  for (int64_t b = threadIdx.x; b <= task.batch; b += kThreads) {
    // The end of the last sequence is the start of the one after it.
    const int64_t start =
        b < task.batch ? sequence_span(task.sequences, b).start : sequence_span(task.sequences, b - 1).stop;
    task.starts[b] = static_cast<int32_t>(start);
  }
  __syncthreads();
  const int batch = static_cast<int>(task.batch), stop = task.starts[batch];
  for (int64_t tile = threadIdx.x; tile * sm90::kTileTokens < stop; tile += kThreads) {
    const int row = static_cast<int>(tile * sm90::kTileTokens);
    task.first_sequences[tile] = sm90::first_sequence_after(task.starts, batch, row);
  }
}

// All blocks of the grid.
template <typename Move>
__device__ void pack(const PackTask& task, int parts, const Move& move) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
#pragma unroll 4
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < task.zero_vectors; i += stride) {
    task.zeros[i] = uint4{};
  }
  if (task.mask != nullptr) {
    pack_padded(task, parts, move);
  } else if (blockIdx.x == 0) {
    plan_packed(task);
  }
}

}  // namespace splade_fast::cuda::packing
