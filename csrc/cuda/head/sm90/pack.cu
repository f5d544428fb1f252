// Packing for the dense head, in one launch.
#include "cuda/head/sm90/pack.cuh"

namespace splade_fast::cuda {
namespace {

__global__ void __launch_bounds__(packing::kThreads) pack_kernel(const PackTask task, int parts) {
  packing::pack(task, parts, [&](int64_t row, int64_t target) { packing::move_row(task, row, target); });
}

}  // namespace

cudaError_t launch_pack(const PackTask& task, int64_t multiprocessors, cudaStream_t stream) {
  const packing::Grid grid = packing::grid_of(task, multiprocessors);
  pack_kernel<<<grid.blocks, packing::kThreads, 0, stream>>>(task, grid.parts);
  return cudaGetLastError();
}

}  // namespace splade_fast::cuda
