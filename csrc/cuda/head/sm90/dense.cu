// head forward on sm_90a, max pooling, bfloat16, float16 and float32 as TF32: one kernel multiplies and reduces; logits
// never leave the registers.
//
// product.cuh multiplies. tiles.h holds the order of the tiles and their reduction.
//
// The machine code of nvcc 13.0 (bfloat16 with positions, two blocks to a cluster) has 2760 instructions, no
// local memory, 168 registers at the start, then 40 and 232. The main loop is four HGMMA.64x256x16 to a group, with
// nothing but uniform integer instructions between them; it waits for the group before (WARPGROUP.DEPBAR.LE 1) and
// frees that one's stage by one SYNCS.ARRIVE. A tile of one sequence is reduced by three instructions per accumulator,
// FSETP, SEL and FMNMX.NAN, by one without positions. benchmarks/NOTES.md says what to expect of it and what to try.
#include "cuda/head/sm90/dense.h"
#include "cuda/head/sm90/key_sink.cuh"
#include "cuda/head/sm90/product.cuh"

namespace splade_fast::cuda::sm90 {
namespace {

using hopper::Operand;

// The type of bias and pooled values for a type of operands.
template <Operand kOperand>
using Element = std::conditional_t<kOperand == Operand::kBfloat16, __nv_bfloat16,
                                   std::conditional_t<kOperand == Operand::kFloat16, __half, float>>;

template <Operand kOperand, bool kPositions>
__device__ KeySink<Element<kOperand>, kPositions> sink_of(const HeadTask& task) {
  return {task.outputs, task.keys, task.shape.vocabulary};
}

template <Operand kOperand, bool kPositions>
__device__ void reduce_tile(const HeadTask& task, const float (&accumulators)[kAccumulators], int token_tile,
                            int first_entry) {
  const int thread = static_cast<int>(threadIdx.x) % hopper::kWarpgroupThreads, quarter = thread % 4;
  const int first_row = token_tile * kTileTokens;
  // Two of four neighbouring threads write, one entry each.
  const int entry = first_entry + hopper::accumulator_row(thread, 2 * (quarter % 2));
  const bool writes = quarter < 2 && entry < task.shape.vocabulary;
  auto sink = sink_of<kOperand, kPositions>(task);
  for_each_segment(task.rows.starts, task.rows.batch, task.first_sequences[token_tile], first_row,
                   [&](const Segment& segment) {
                     MaxKey<kPositions> key[2];
                     max_of_segment<kPositions>(accumulators, thread, segment, key);
#pragma unroll
                     for (int half = 0; half < 2; ++half) {
                       key[half] = max(key[half], __shfl_xor_sync(kAllLanes, key[half], 1));
                       key[half] = max(key[half], __shfl_xor_sync(kAllLanes, key[half], 2));
                     }
                     if (writes) emit(task.rows, segment, first_row, entry, quarter == 0 ? key[0] : key[1], sink);
                     __syncwarp();  // wgmma needs whole warps
                   });
}

// Reduces the tiles of the product.
template <Operand kOperand, bool kPositions>
struct Reduction {
  const HeadTask& task;

  __device__ void begin(int, int) {}
  __device__ void reduce(const float (&accumulators)[kAccumulators], int token_tile, int first_entry) {
    reduce_tile<kOperand, kPositions>(task, accumulators, token_tile, first_entry);
  }
};

template <Operand kOperand, bool kPositions, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    head_sm90_kernel(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap token_map,
                     const __grid_constant__ HeadTask task) {
#if defined(SPLADE_FAST_SM90A)
  if (!task.only_if.holds()) return;
  Reduction<kOperand, kPositions> reduction{task};
  multiply_tiles<kOperand, kCluster>(weight_map, token_map, static_cast<int>(task.shape.vocabulary),
                                     task.rows.starts[task.rows.batch], static_cast<int>(task.shape.dim), reduction);
#endif
}

// Stores the results of sequences that cross tiles and of sequences without rows. blockIdx.y walks over the sequences.
constexpr int kFinishThreads = 256;
template <Operand kOperand, bool kPositions>
__global__ void __launch_bounds__(kFinishThreads) store_kernel(const HeadTask task) {
  const int entry = static_cast<int>(blockIdx.x) * kFinishThreads + static_cast<int>(threadIdx.x);
  if (entry >= task.shape.vocabulary || !task.only_if.holds()) return;
  auto sink = sink_of<kOperand, kPositions>(task);
  for (int b = static_cast<int>(blockIdx.y); b < task.rows.batch; b += static_cast<int>(gridDim.y)) {
    store_remaining(task.rows, b, entry, sink);
  }
}

// Host functions -------------------------------------------------------------------------------------------------

template <Operand kOperand, bool kPositions, int kCluster>
cudaError_t launch_kernel(const HeadTask& task, cudaStream_t stream) {
  return launch_product<kOperand, kCluster>(head_sm90_kernel<kOperand, kPositions, kCluster>,
                                            {task.weight, task.tokens}, task.shape, task, stream);
}

template <Operand kOperand, bool kPositions>
cudaError_t launch_tiles(const HeadTask& task, cudaStream_t stream) {
  return choose_cluster(task.shape.vocabulary) == 2 ? launch_kernel<kOperand, kPositions, 2>(task, stream)
                                                    : launch_kernel<kOperand, kPositions, 1>(task, stream);
}

template <Operand kOperand, bool kPositions>
cudaError_t launch_all(const HeadTask& task, cudaStream_t stream) {
  const cudaError_t error = launch_tiles<kOperand, kPositions>(task, stream);
  if (error != cudaSuccess) return error;
  constexpr int kMaxWalkers = 1024;
  const int batch = task.rows.batch;
  const dim3 grid(static_cast<unsigned>(ceil_div(task.shape.vocabulary, kFinishThreads)),
                  static_cast<unsigned>(batch < kMaxWalkers ? batch : kMaxWalkers));
  store_kernel<kOperand, kPositions><<<grid, kFinishThreads, 0, stream>>>(task);
  return cudaGetLastError();
}

// Calls launch(constant of the operand, constant of whether positions are kept).
template <typename Launch>
cudaError_t dispatch(const HeadTask& task, const Launch& launch) {
  const auto with_positions = [&](auto operand) {
    return task.outputs.max_logits != nullptr ? launch(operand, std::true_type{}) : launch(operand, std::false_type{});
  };
  switch (task.operand) {
    case Operand::kBfloat16:
      return with_positions(std::integral_constant<Operand, Operand::kBfloat16>{});
    case Operand::kFloat16:
      return with_positions(std::integral_constant<Operand, Operand::kFloat16>{});
    case Operand::kTfloat32:
      return with_positions(std::integral_constant<Operand, Operand::kTfloat32>{});
    default:
      return cudaErrorNotSupported;
  }
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
  return dispatch(task, [&](auto operand, auto positions) {
    return launch_all<decltype(operand)::value, decltype(positions)::value>(task, stream);
  });
}

cudaError_t launch_head_tiles(const HeadTask& task, cudaStream_t stream) {
  return dispatch(task, [&](auto operand, auto positions) {
    return launch_tiles<decltype(operand)::value, decltype(positions)::value>(task, stream);
  });
}

}  // namespace splade_fast::cuda::sm90
