// Packing on CUDA: count the real tokens of each sequence, scan, number them, move their rows.
#include "cuda/block.cuh"
#include "cuda/head/sm90/pack.h"

namespace splade_fast::cuda {
namespace {

constexpr int kThreads = 256, kScanThreads = 1024;

// A warp per sequence writes the number of its real tokens where the scan expects it.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const bool* mask, int64_t length, int64_t batch, int32_t* starts) {
  const int64_t b = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (b >= batch) return;
  const int lane = threadIdx.x % kWarp;
  int count = 0;
  for (int64_t l = lane; l < length; l += kWarp) count += mask[b * length + l];
  count = warp_sum(count);
  if (lane == 0) starts[b + 1] = count;
}

// Turns counts into starts, in one block.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(int32_t* starts, int64_t batch) {
  __shared__ int counts[kScanThreads / kWarp];
  int carried = 0;
  for (int64_t first = 0; first < batch; first += kScanThreads) {
    const int64_t b = first + threadIdx.x;
    const int count = b < batch ? starts[b + 1] : 0;
    const Sums<int> sum = block_sums(count, counts);
    if (b < batch) starts[b + 1] = carried + sum.before + count;
    carried += sum.total;
  }
  if (threadIdx.x == 0) starts[0] = 0;
}

__global__ void __launch_bounds__(kThreads) starts_kernel(Sequences sequences, int64_t batch, int32_t* starts) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b > batch) return;
  // The end of the last sequence is the start of the one after it.
  starts[b] =
      static_cast<int32_t>(b < batch ? sequence_span(sequences, b).start : sequence_span(sequences, b - 1).stop);
}

// A block per sequence numbers its real tokens.
__global__ void __launch_bounds__(kThreads)
    number_kernel(const bool* mask, int64_t length, const int32_t* starts, int32_t* source_rows) {
  __shared__ int counts[kThreads / kWarp];
  const int64_t b = blockIdx.x;
  int32_t* target = source_rows + starts[b];
  for (int64_t first = 0; first < length; first += kThreads) {
    const int64_t l = first + threadIdx.x, row = b * length + l;
    const bool is_real = l < length && mask[row];
    const Sums<int> sum = block_sums(static_cast<int>(is_real), counts);
    if (is_real) target[sum.before] = static_cast<int32_t>(row);
    target += sum.total;
  }
}

// A warp moves a packed row, then the next of its rows. The rows behind the last one of its tile become zero.
__global__ void __launch_bounds__(kThreads) move_kernel(const PackTask task, int64_t vectors) {
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads / kWarp, count = task.starts[task.batch];
  const int64_t end = min(round_up(count, task.tile_rows), task.sequences.rows);
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; row < end; row += stride) {
    uint4* target = static_cast<uint4*>(task.packed) + row * vectors;
    if (row >= count) {
      for (int64_t i = lane; i < vectors; i += kWarp) target[i] = uint4{};
      continue;
    }
    const uint4* source = static_cast<const uint4*>(task.rows) + task.source_rows[row] * vectors;
#pragma unroll 4
    for (int64_t i = lane; i < vectors; i += kWarp) target[i] = source[i];
  }
}

}  // namespace

cudaError_t launch_pack(const PackTask& task, int64_t multiprocessors, cudaStream_t stream) {
  const auto blocks = [](int64_t count, int64_t per_block) {
    return static_cast<unsigned>(ceil_div(count, per_block));
  };
  if (task.mask == nullptr) {
    starts_kernel<<<blocks(task.batch + 1, kThreads), kThreads, 0, stream>>>(task.sequences, task.batch, task.starts);
    return cudaGetLastError();
  }
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  const int64_t length = task.sequences.length, warps = kThreads / kWarp;
  count_kernel<<<blocks(task.batch, warps), kThreads, 0, stream>>>(task.mask, length, task.batch, task.starts);
  scan_kernel<<<1, kScanThreads, 0, stream>>>(task.starts, task.batch);
  number_kernel<<<static_cast<unsigned>(task.batch), kThreads, 0, stream>>>(task.mask, length, task.starts,
                                                                            task.source_rows);
  const int64_t movers = ceil_div(task.sequences.rows, warps), most = multiprocessors * kBlocksPerMultiprocessor;
  move_kernel<<<static_cast<unsigned>(movers < most ? movers : most), kThreads, 0, stream>>>(
      task, task.row_bytes / kVectorBytes);
  return cudaGetLastError();
}

}  // namespace splade_fast::cuda
