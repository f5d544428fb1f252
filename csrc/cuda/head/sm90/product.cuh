// The product weight · tokensᵀ on sm_90a, tile by tile; the caller reduces each tile in registers.
//
// Persistent blocks of three warpgroups: one thread of the first keeps the copy engine busy, the other two multiply 64
// vocabulary entries each by the tile's 256 tokens. Two blocks of a cluster share each token tile, half of it copied by
// either. tiles.h holds the order of the tiles.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "cuda/head/sm90/instructions.cuh"
#include "cuda/head/sm90/tensor_map.h"
#include "cuda/head/sm90/tiles.h"

namespace splade_fast::cuda::sm90 {

#if defined(SPLADE_FAST_SM90A)

// Multiplies each tile of this block. Each multiplying warpgroup calls consumer.begin(token tile, first entry) before
// the product and consumer.reduce(accumulators, token tile, first entry) after it. All threads of the cluster call this
// function once in a kernel.
template <hopper::Operand kOperand, int kCluster, typename Consumer>
__device__ inline void multiply_tiles(const CUtensorMap& weight_map, const CUtensorMap& token_map, int vocabulary,
                                      int rows, int dim, Consumer& consumer) {
  using namespace hopper;
  extern __shared__ uint8_t dynamic[];
  const uint32_t tiles = (shared_address(dynamic) + kSwizzledBytes - 1) / kSwizzledBytes * kSwizzledBytes;
  const uint32_t full = tiles + kStages * kStageBytes, empty = full + kStages * 8;
  const int rank = kCluster > 1 ? block_in_cluster() : 0;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(full + stage * 8, 1);
      init_barrier(empty + stage * 8, empty_arrivals(kCluster));
    }
    fence_barrier_init();
  }
  if constexpr (kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }

  constexpr int kTileDims = row_elements(kOperand);
  const int steps = (dim + kTileDims - 1) / kTileDims;
  const TileOrder order = TileOrder::of(vocabulary, rows, kCluster);
  const int first_tile = static_cast<int>(blockIdx.x) / kCluster, num_tiles = static_cast<int>(order.count());
  const int tile_stride = static_cast<int>(gridDim.x) / kCluster;
  Ring<kStages> ring;
  // Read from one lane, so that the compiler knows the value to be the same for the warp.
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == kConsumers) {
    give_up_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroupThreads) {
      prefetch(weight_map);
      prefetch(token_map);
      for (int index = first_tile; index < num_tiles; index += tile_stride) {
        const Tile tile = order.at(index);
        const int entry = (tile.entry * kCluster + rank) * kTileEntries, token = tile.token * kTileTokens;
        for (int step = 0; step < steps; ++step, ring.advance()) {
          const uint32_t target = tiles + ring.stage * kStageBytes, barrier = full + ring.stage * 8;
          wait(empty + ring.stage * 8, ring.parity ^ 1);
          arrive_and_expect(barrier, kStageBytes);
          copy_tile(target, weight_map, step * kTileDims, entry, barrier);
          if constexpr (kCluster == 1) {
            copy_tile(target + kEntryBytes, token_map, step * kTileDims, token, barrier);
          } else {
            constexpr uint16_t kAllBlocks = (1 << kCluster) - 1;
            copy_tile_to_blocks(target + kEntryBytes + rank * (kTokenBytes / kCluster), token_map, step * kTileDims,
                                token + rank * (kTileTokens / kCluster), barrier, kAllBlocks);
          }
        }
      }
    }
  } else {
    take_registers<kConsumerRegisters>();
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto release = [&](int stage) {
      if constexpr (kCluster == 1) {
        if (lane == 0) arrive(empty + stage * 8);
      } else {
        if (lane < kCluster) arrive_at_block(empty + stage * 8, lane);
      }
    };
    const uint64_t own_entries = matrix_descriptor(tiles + warpgroup * (kEntryBytes / kConsumers));
    const uint64_t all_tokens = matrix_descriptor(tiles + kEntryBytes);
    for (int index = first_tile; index < num_tiles; index += tile_stride) {
      const Tile tile = order.at(index);
      const int first_entry = (tile.entry * kCluster + rank) * kTileEntries + warpgroup * kInstructionEntries;
      consumer.begin(tile.token, first_entry);
      OperandSum<kOperand> accumulators[kAccumulators];
      int before = 0;
      for (int step = 0; step < steps; ++step, ring.advance()) {
        wait(full + ring.stage * 8, ring.parity);
        const uint64_t offset = static_cast<uint64_t>(ring.stage * (kStageBytes / 16));
        wgmma_fence();
#pragma unroll
        for (int part = 0; part < kRowInstructions; ++part) {
          wgmma<kOperand>(accumulators, deeper(own_entries + offset, part), deeper(all_tokens + offset, part),
                          step + part);
        }
        wgmma_commit();
        // wgmma has read the step before this one, so its stage is free.
        wgmma_wait<1>();
        if (step > 0) release(before);
        before = ring.stage;
      }
      wgmma_wait<0>();
      pin(accumulators);
      release(before);
      consumer.reduce(accumulators, tile.token, first_entry);
    }
  }
  // No block may end while the other one copies to it or arrives at its barriers.
  if constexpr (kCluster > 1) cluster_sync();
}

#endif

// Operands of a product, both of the same type and with rows that fits() takes.
struct ProductOperands {
  const void* weight;  // (shape.vocabulary, shape.dim)
  const void* tokens;  // (shape.rows, shape.dim)
};

// Permits the kernel its shared memory on the current device, and finds the number of clusters that run at a time. Both
// cost the host microseconds and are done once.
template <typename Kernel>
cudaError_t prepare_kernel(Kernel kernel, const cudaLaunchConfig_t& config, int& clusters) {
  static std::mutex mutex;
  static std::map<std::pair<Kernel, int>, int> known;  // by kernel and device
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, device});
  if (found != known.end()) {
    clusters = found->second;
    return cudaSuccess;
  }
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error == cudaSuccess) known[{kernel, device}] = clusters;
  return error;
}

// Launches kernel(weight map, token map, task), which calls multiply_tiles<kOperand, kCluster>.
template <hopper::Operand kOperand, int kCluster, typename Task>
cudaError_t launch_product(void (*kernel)(CUtensorMap, CUtensorMap, Task), const ProductOperands& operands,
                           const Shape& shape, const Task& task, cudaStream_t stream) {
  CUtensorMap weight_map, token_map;
  cudaError_t error =
      hopper::make_tensor_map(weight_map, {operands.weight, shape.vocabulary, shape.dim, kTileEntries, kOperand});
  if (error != cudaSuccess) return error;
  error =
      hopper::make_tensor_map(token_map, {operands.tokens, shape.rows, shape.dim, kTileTokens / kCluster, kOperand});
  if (error != cudaSuccess) return error;

  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kCluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  // As many clusters as run at a time, but no more than tiles.
  int clusters = 0;
  error = prepare_kernel(kernel, config, clusters);
  if (error != cudaSuccess) return error;
  const int64_t most =
      TileOrder::of(static_cast<int>(shape.vocabulary), static_cast<int>(shape.rows), kCluster).count();
  clusters = static_cast<int>(most < clusters ? most : clusters);
  if (clusters == 0) return cudaErrorInvalidConfiguration;
  config.gridDim = dim3(static_cast<unsigned>(clusters * kCluster));
  return cudaLaunchKernelEx(&config, kernel, weight_map, token_map, task);
}

}  // namespace splade_fast::cuda::sm90
