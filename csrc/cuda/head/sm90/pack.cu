// Packing on CUDA: one block plans where each sequence goes, then blocks number the real tokens of a sequence and move
// their rows.
#include "cuda/block.cuh"
#include "cuda/head/sm90/pack.h"
#include "cuda/head/sm90/tiles.h"

namespace splade_fast::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kPlanThreads = 1024, kPlanWarps = kPlanThreads / kWarp;

// A warp per sequence writes the number of its real tokens where the scan expects it.
__device__ void count_tokens(const PackTask& task) {
  const int lane = threadIdx.x % kWarp;
  const int64_t length = task.sequences.length;
  for (int64_t b = threadIdx.x / kWarp; b < task.batch; b += kPlanWarps) {
    int count = 0;
#pragma unroll 8
    for (int64_t l = lane; l < length; l += kWarp) count += task.mask[b * length + l];
    count = warp_sum(count);
    if (lane == 0) task.starts[b + 1] = count;
  }
}

// Turns counts into starts.
__device__ void add_up_starts(const PackTask& task) {
  __shared__ int counts[kPlanWarps];
  int carried = 0;
  for (int64_t first = 0; first < task.batch; first += kPlanThreads) {
    const int64_t b = first + threadIdx.x;
    const int count = b < task.batch ? task.starts[b + 1] : 0;
    const Sums<int> sum = block_sums(count, counts);
    if (b < task.batch) task.starts[b + 1] = carried + sum.before + count;
    carried += sum.total;
  }
  if (threadIdx.x == 0) task.starts[0] = 0;
}

__device__ void copy_starts(const PackTask& task) {
  for (int64_t b = threadIdx.x; b <= task.batch; b += kPlanThreads) {
    // The end of the last sequence is the start of the one after it.
    const int64_t start =
        b < task.batch ? sequence_span(task.sequences, b).start : sequence_span(task.sequences, b - 1).stop;
    task.starts[b] = static_cast<int32_t>(start);
  }
}

// One block.
__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const PackTask task) {
  if (task.mask != nullptr) {
    count_tokens(task);
    __syncthreads();
    add_up_starts(task);
  } else {
    copy_starts(task);
  }
  for (int64_t i = threadIdx.x; i < task.zero_count; i += kPlanThreads) task.zeros[i] = 0;
  __syncthreads();
  const int batch = static_cast<int>(task.batch);
  for (int tile = static_cast<int>(threadIdx.x); tile < task.tiles; tile += kPlanThreads) {
    task.first_sequences[tile] = sm90::first_sequence_after(task.starts, batch, tile * sm90::kTileTokens);
  }
}

// A warp moves a row, with a few loads of each lane in flight together.
__device__ void move_row(const PackTask& task, int64_t from, int64_t to) {
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

// The rows behind the last one of its tile become zero.
__device__ void clear_rest_of_tile(const PackTask& task) {
  const int64_t vectors = task.row_bytes / kVectorBytes, count = task.starts[task.batch];
  const int64_t end = min(round_up(count, sm90::kTileTokens), task.sequences.rows);
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  for (int64_t row = count + warp; row < end; row += static_cast<int64_t>(gridDim.x) * kWarps) {
    uint4* target = static_cast<uint4*>(task.packed) + row * vectors;
    for (int64_t i = threadIdx.x % kWarp; i < vectors; i += kWarp) target[i] = uint4{};
  }
}

// `parts` blocks per sequence. Each numbers the real tokens of the whole sequence, kThreads at a time, and its warps
// move every so many of them.
__global__ void __launch_bounds__(kThreads) move_kernel(const PackTask task, int parts) {
  __shared__ int counts[kWarps];
  __shared__ int32_t rows[kThreads];
  const int64_t b = blockIdx.x / parts, length = task.sequences.length;
  const int mover = static_cast<int>(blockIdx.x % parts) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  int64_t target = task.starts[b];
  for (int64_t first = 0; first < length; first += kThreads) {
    const int64_t l = first + threadIdx.x, row = b * length + l;
    const bool is_real = l < length && task.mask[row];
    const Sums<int> real = block_sums(static_cast<int>(is_real), counts);
    if (is_real) rows[real.before] = static_cast<int32_t>(row);
    __syncthreads();
    for (int i = mover; i < real.total; i += parts * kWarps) {
      move_row(task, rows[i], target + i);
      if (threadIdx.x % kWarp == 0) task.source_rows[target + i] = rows[i];
    }
    target += real.total;
  }
  clear_rest_of_tile(task);
}

}  // namespace

cudaError_t launch_pack(const PackTask& task, int64_t multiprocessors, cudaStream_t stream) {
  plan_kernel<<<1, kPlanThreads, 0, stream>>>(task);
  if (task.mask == nullptr) return cudaGetLastError();
  constexpr int64_t kBlocksPerMultiprocessor = 4;
  const int64_t parts = ceil_div(multiprocessors * kBlocksPerMultiprocessor, task.batch);
  const int64_t most = ceil_div(task.sequences.length, kWarps);
  const int64_t chosen = parts < most ? parts : most;
  move_kernel<<<static_cast<unsigned>(task.batch * chosen), kThreads, 0, stream>>>(task, static_cast<int>(chosen));
  return cudaGetLastError();
}

}  // namespace splade_fast::cuda
