// head forward on sm_90a, max pooling, bfloat16, float16, float32 as TF32 and scaled e4m3: one kernel multiplies and
// reduces; logits never leave the registers.
//
// Persistent blocks of three warpgroups: one thread of the first keeps the copy engine busy, the other two multiply 64
// vocabulary entries each by the tile's 256 tokens and reduce them. Two blocks of a cluster share each token tile, half
// of it copied by either. head_sm90_tiles.h has the order of the tiles and the reduction.
//
// What the machine code of nvcc 13.0 shows (bfloat16 with positions, two blocks to a cluster): 2750 instructions, no
// local memory, 168 registers at the start, then 40 and 232. The main loop is four HGMMA.64x256x16 to a group, with
// nothing but uniform integer instructions between them; it waits for the group before (WARPGROUP.DEPBAR.LE 1) and
// frees that one's stage by one SYNCS.ARRIVE. A tile of one sequence is reduced by three instructions per accumulator,
// FSETP, SEL and FMNMX.NAN, by one without positions. benchmarks/NOTES.md says what to expect of it and what to try.
#include "head_sm90.h"
#include "hopper.cuh"
#include "tensor_map.h"

namespace splade_fast::cuda::sm90 {
namespace {

// Which sequence the walk over a tile's segments begins with.
constexpr int kPlanThreads = 256;
__global__ void __launch_bounds__(kPlanThreads)
    first_sequences_kernel(const int32_t* starts, int batch, int tiles, int32_t* first_sequences) {
  const int tile = static_cast<int>(blockIdx.x) * kPlanThreads + static_cast<int>(threadIdx.x);
  if (tile < tiles) first_sequences[tile] = first_sequence_after(starts, batch, tile * kTileTokens);
}

template <typename K>
__device__ void merge_key(K* key, K candidate) {
  if constexpr (sizeof(K) == 8) {
    atomicMax(reinterpret_cast<unsigned long long*>(key), static_cast<unsigned long long>(candidate));
  } else {
    atomicMax(key, candidate);
  }
}

using hopper::Operand;

// The type of bias and pooled values that goes with operands.
template <Operand kOperand>
using Element = std::conditional_t<kOperand == Operand::kBfloat16, __nv_bfloat16,
                                   std::conditional_t<kOperand == Operand::kFloat16, __half, float>>;

// Outputs and keys of a task.
template <Operand kOperand, bool kPositions>
struct DeviceSink {
  const HeadTask& task;

  __device__ Key<kPositions>* key(int slot, int entry) const {
    return static_cast<Key<kPositions>*>(task.keys) + slot * task.shape.vocabulary + entry;
  }
  __device__ void store(int sequence, int entry, float value, int position, bool counted) {
    // Scales are positive: the maximum is the same with them and without. That of no rows is -inf whatever they are.
    if constexpr (kOperand == Operand::kE4m3) {
      if (counted) value = value * task.sequence_scales[sequence] * task.entry_scales[entry];
    }
    store_maximum<Element<kOperand>>(task.outputs, sequence, entry, value, position, counted);
  }
  __device__ void merge(int slot, int entry, Key<kPositions> candidate) { merge_key(key(slot, entry), candidate); }
  __device__ Key<kPositions> merged(int slot, int entry) const { return *key(slot, entry); }
};

template <Operand kOperand, bool kPositions>
__device__ void reduce_tile(const HeadTask& task, const float (&accumulators)[kAccumulators], int token_tile,
                            int first_entry) {
  const int thread = static_cast<int>(threadIdx.x) % hopper::kWarpgroupThreads, quarter = thread % 4;
  const int first_row = token_tile * kTileTokens;
  // Two of four neighbouring threads write, one entry each.
  const int entry = first_entry + hopper::accumulator_row(thread, 2 * (quarter % 2));
  const bool writes = quarter < 2 && entry < task.shape.vocabulary;
  DeviceSink<kOperand, kPositions> sink{task};
  for_each_segment(task.rows.starts, task.rows.batch, task.first_sequences[token_tile], first_row,
                   [&](const Segment& segment) {
                     Key<kPositions> key[2];
                     max_of_segment<kPositions>(accumulators, thread, segment, key);
#pragma unroll
                     for (int half = 0; half < 2; ++half) {
                       key[half] = max(key[half], __shfl_xor_sync(hopper::kAllLanes, key[half], 1));
                       key[half] = max(key[half], __shfl_xor_sync(hopper::kAllLanes, key[half], 2));
                     }
                     if (writes) emit(task.rows, segment, first_row, entry, quarter == 0 ? key[0] : key[1], sink);
                   });
}

template <Operand kOperand, bool kPositions, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    head_sm90_kernel(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap token_map,
                     const __grid_constant__ HeadTask task) {
#if defined(SPLADE_FAST_SM90A)
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

  constexpr int kTileDepth = row_elements(kOperand);
  const int depth = static_cast<int>(task.shape.depth), steps = (depth + kTileDepth - 1) / kTileDepth;
  const TileOrder order =
      TileOrder::of(static_cast<int>(task.shape.vocabulary), task.rows.starts[task.rows.batch], kCluster);
  const int first_tile = static_cast<int>(blockIdx.x) / kCluster, num_tiles = static_cast<int>(order.count());
  const int tile_stride = static_cast<int>(gridDim.x) / kCluster;
  Ring<kStages> ring;
  // From one lane, so that the compiler knows it to be the same for the warp.
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
          copy_tile(target, weight_map, step * kTileDepth, entry, barrier);
          if constexpr (kCluster == 1) {
            copy_tile(target + kEntryBytes, token_map, step * kTileDepth, token, barrier);
          } else {
            constexpr uint16_t kAllBlocks = (1 << kCluster) - 1;
            copy_tile_to_blocks(target + kEntryBytes + rank * (kTokenBytes / kCluster), token_map, step * kTileDepth,
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
      float accumulators[kAccumulators];
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
        // The step before this one has been read: its stage is free.
        wgmma_wait<1>();
        if (step > 0) release(before);
        before = ring.stage;
      }
      wgmma_wait<0>();
      pin(accumulators);
      release(before);
      reduce_tile<kOperand, kPositions>(
          task, accumulators, tile.token,
          (tile.entry * kCluster + rank) * kTileEntries + warpgroup * kInstructionEntries);
    }
  }
  // No block may end while the other still copies to it or arrives at its barriers.
  if constexpr (kCluster > 1) cluster_sync();
#endif
}

// The results of sequences that no single tile had all rows of, and of those without rows. blockIdx.y walks over them.
constexpr int kFinishThreads = 256;
template <Operand kOperand, bool kPositions>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const HeadTask task) {
  const int entry = static_cast<int>(blockIdx.x) * kFinishThreads + static_cast<int>(threadIdx.x);
  if (entry >= task.shape.vocabulary) return;
  DeviceSink<kOperand, kPositions> sink{task};
  for (int b = static_cast<int>(blockIdx.y); b < task.rows.batch; b += static_cast<int>(gridDim.y)) {
    finish(task.rows, b, entry, sink);
  }
}

// Host functions -------------------------------------------------------------------------------------------------

template <Operand kOperand, bool kPositions, int kCluster>
cudaError_t launch_kernel(const HeadTask& task, cudaStream_t stream) {
  CUtensorMap weight_map, token_map;
  cudaError_t error =
      hopper::make_tensor_map(weight_map, task.weight, task.shape.vocabulary, task.shape.depth, kTileEntries, kOperand);
  if (error != cudaSuccess) return error;
  error = hopper::make_tensor_map(token_map, task.tokens, task.shape.rows, task.shape.depth, kTileTokens / kCluster,
                                  kOperand);
  if (error != cudaSuccess) return error;

  const auto kernel = head_sm90_kernel<kOperand, kPositions, kCluster>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
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
  // As many clusters as run at a time, but no more than there can be tiles.
  int clusters = 0;
  error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error != cudaSuccess) return error;
  const int64_t most =
      TileOrder::of(static_cast<int>(task.shape.vocabulary), static_cast<int>(task.shape.rows), kCluster).count();
  clusters = static_cast<int>(most < clusters ? most : clusters);
  if (clusters == 0) return cudaErrorInvalidConfiguration;
  config.gridDim = dim3(static_cast<unsigned>(clusters * kCluster));
  return cudaLaunchKernelEx(&config, kernel, weight_map, token_map, task);
}

template <Operand kOperand, bool kPositions>
cudaError_t launch_all(const HeadTask& task, cudaStream_t stream) {
  const int batch = task.rows.batch, tiles = task.rows.tiles;
  cudaError_t error = cudaMemsetAsync(task.keys, 0, static_cast<size_t>(key_bytes(task.shape, kPositions)), stream);
  if (error != cudaSuccess) return error;
  first_sequences_kernel<<<static_cast<unsigned>(ceil_div(tiles, kPlanThreads)), kPlanThreads, 0, stream>>>(
      task.rows.starts, batch, tiles, task.first_sequences);
  error = choose_cluster(task.shape.vocabulary) == 2 ? launch_kernel<kOperand, kPositions, 2>(task, stream)
                                                     : launch_kernel<kOperand, kPositions, 1>(task, stream);
  if (error != cudaSuccess) return error;
  constexpr int kMaxWalkers = 1024;
  const dim3 grid(static_cast<unsigned>(ceil_div(task.shape.vocabulary, kFinishThreads)),
                  static_cast<unsigned>(batch < kMaxWalkers ? batch : kMaxWalkers));
  finish_kernel<kOperand, kPositions><<<grid, kFinishThreads, 0, stream>>>(task);
  return cudaGetLastError();
}

template <Operand kOperand>
cudaError_t launch_operand(const HeadTask& task, cudaStream_t stream) {
  return task.outputs.max_logits != nullptr ? launch_all<kOperand, true>(task, stream)
                                            : launch_all<kOperand, false>(task, stream);
}

}  // namespace

bool is_built() {
#if defined(SPLADE_FAST_BUILT_FOR_SM90A)
  return true;
#else
  return false;
#endif
}

cudaError_t launch_head(const HeadTask& task, cudaStream_t stream) {
  switch (task.operand) {
    case Operand::kBfloat16:
      return launch_operand<Operand::kBfloat16>(task, stream);
    case Operand::kFloat16:
      return launch_operand<Operand::kFloat16>(task, stream);
    case Operand::kTfloat32:
      return launch_operand<Operand::kTfloat32>(task, stream);
    case Operand::kE4m3:
      return launch_operand<Operand::kE4m3>(task, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace splade_fast::cuda::sm90
