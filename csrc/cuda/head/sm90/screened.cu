// The screened head forward on sm_90a. An int8 product leaves a list of pairs of token and entry that may have a
// positive logit; only these are multiplied in full precision. docs/screening.md derives the bound. Where the list
// overflows, the kernels of dense.cu, launched behind, compute everything, without the host.
#include "cuda/head/sm90/key_sink.cuh"
#include "cuda/head/sm90/product.cuh"
#include "cuda/head/sm90/screened.h"
#include "cuda/warp.cuh"

namespace splade_fast::cuda::sm90 {
namespace {

constexpr int kThreadsPerBlock = 256;

__device__ bool has_too_many(const ScreenedTask& task) {
  return *task.count > static_cast<unsigned long long>(task.capacity);
}

#if defined(SPLADE_FAST_SM90A)

// Reserves places for the candidates of each lane and returns the first place of this lane.
__device__ unsigned long long reserve(unsigned long long* count, int found) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int through = warp_inclusive_sum(found);
  const int total = __shfl_sync(kAllLanes, through, kWarp - 1);
  unsigned long long first = 0;
  if (lane == 0) first = atomicAdd(count, static_cast<unsigned long long>(total));
  return __shfl_sync(kAllLanes, first, 0) + static_cast<unsigned long long>(through - found);
}

// Collects the candidates of the tiles of the product.
struct Collector {
  const ScreenedTask& task;
  int threshold[2] = {INT_MAX, INT_MAX};  // of the entries of this thread, in the current tile

  // Runs before the product, so that the loads overlap with it.
  __device__ void begin(int token_tile, int first_entry) {
    const ScreenTile tile = task.tiles[token_tile];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int entry = entry_of(first_entry, half);
      threshold[half] = entry < task.head.shape.vocabulary ? integer_threshold(task.entries[entry], tile) : INT_MAX;
    }
  }

  __device__ void reduce(const int32_t (&accumulators)[kAccumulators], int token_tile, int first_entry) {
    if (!__any_sync(kAllLanes, any_above(accumulators, threshold))) return;
    const int first_row = token_tile * kTileTokens, rows = task.head.rows.starts[task.head.rows.batch];
    uint32_t words[2][kWords];
    find_above(accumulators, threshold, own_thread(), rows - first_row, words);
    int found = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) found += __popc(words[half][w]);
    }
    unsigned long long place = reserve(task.count, found);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        for (uint32_t word = words[half][w]; word != 0; word &= word - 1, ++place) {
          const int i = 32 * w + __ffs(static_cast<int>(word)) - 1;
          if (place < static_cast<unsigned long long>(task.capacity)) {
            task.candidates[place] = {first_row + own_column(own_thread(), i), entry_of(first_entry, half)};
          }
        }
      }
    }
    __syncwarp();  // wgmma needs whole warps
  }

  __device__ static int own_thread() { return static_cast<int>(threadIdx.x) % hopper::kWarpgroupThreads; }
  __device__ static int entry_of(int first_entry, int half) {
    return first_entry + hopper::accumulator_row(own_thread(), 2 * half);
  }
};

#endif

template <int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    screen_sm90_kernel(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap token_map,
                       const __grid_constant__ ScreenedTask task) {
#if defined(SPLADE_FAST_SM90A)
  // No block may end early, even with too many candidates from the start: the count grows meanwhile, and the blocks of
  // a cluster would disagree.
  Collector collector{task};
  multiply_tiles<hopper::Operand::kInt8, kCluster>(weight_map, token_map, static_cast<int>(task.head.shape.vocabulary),
                                                   task.head.rows.starts[task.head.rows.batch],
                                                   static_cast<int>(screen_padded_dim(task.head.shape.dim)), collector);
#endif
}

// A warp multiplies a candidate in float32, always in the same order, so the order of the list does not matter.
template <typename T, bool kPositions>
__global__ void __launch_bounds__(kThreadsPerBlock) multiply_candidates_kernel(const ScreenedTask task) {
  if (has_too_many(task)) return;
  constexpr int kVector = kMaxVector<T>;
  const HeadTask& head = task.head;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kThreadsPerBlock / kWarp, count = *task.count;
  const int64_t dim = head.shape.dim;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreadsPerBlock + threadIdx.x) / kWarp; i < count; i += warps) {
    const CandidatePair candidate = task.candidates[i];
    const T* token = static_cast<const T*>(head.tokens) + candidate.row * dim;
    const T* entry = static_cast<const T*>(head.weight) + candidate.entry * dim;
    float sum = 0;
#pragma unroll 4
    for (int64_t d = lane * kVector; d < dim; d += kWarp * kVector) {
      const Vector<T, kVector> a = load_vector<kVector>(token + d), b = load_vector<kVector>(entry + d);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum += to_acc(a.element[j]) * to_acc(b.element[j]);
    }
    sum = warp_sum(sum);
    const int sequence = first_sequence_after(head.rows.starts, head.rows.batch, candidate.row);
    // Where starts do not rise, a row may belong to no sequence.
    if (lane > 0 || sequence >= head.rows.batch || candidate.row < head.rows.starts[sequence]) continue;
    const int position = kPositions ? head.rows.position(sequence, candidate.row) : 0;
    KeySink<T, kPositions>{head.outputs, head.keys, head.shape.vocabulary}.merge(
        sequence, candidate.entry, make_key<kPositions>(sum, static_cast<uint32_t>(position)));
  }
}

// Stores the results: those of the candidates, or what the dense kernel has left to store. An entry without candidates
// has no positive logit and gets the maximum 0. blockIdx.y walks over the sequences.
template <typename T, bool kPositions>
__global__ void __launch_bounds__(kThreadsPerBlock) store_kernel(const ScreenedTask task) {
  const HeadTask& head = task.head;
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreadsPerBlock + threadIdx.x;
  const bool declined = has_too_many(task);
  if (entry == 0 && blockIdx.y == 0) {
    task.report[0] = declined;
    task.report[1] = 0;
    task.report[2] = declined ? 0 : static_cast<int64_t>(*task.count);
    task.report[3] = 100;
  }
  if (entry >= head.shape.vocabulary) return;
  KeySink<T, kPositions> sink{head.outputs, head.keys, head.shape.vocabulary};
  for (int b = static_cast<int>(blockIdx.y); b < head.rows.batch; b += static_cast<int>(gridDim.y)) {
    if (declined) {
      store_remaining(head.rows, b, static_cast<int>(entry), sink);
      continue;
    }
    const MaxKey<kPositions> key = sink.merged(b, entry);
    const bool found = key != 0;
    sink.store(b, entry, found ? value_of(key) : 0.0f, found ? static_cast<int>(position_of(key)) : 0, found);
  }
}

// Launchers ------------------------------------------------------------------------------------------------------

template <int kCluster>
cudaError_t launch_screen(const ScreenedTask& task, cudaStream_t stream) {
  const Shape& shape = task.head.shape;
  return launch_product<hopper::Operand::kInt8, kCluster>(
      screen_sm90_kernel<kCluster>, {task.weight, task.tokens},
      {shape.rows, shape.batch, shape.vocabulary, screen_padded_dim(shape.dim)}, task, stream);
}

template <typename T, bool kPositions>
cudaError_t launch_all(const ScreenedTask& task, int64_t multiprocessors, cudaStream_t stream) {
  const int64_t vocabulary = task.head.shape.vocabulary;
  cudaError_t error = choose_cluster(vocabulary) == 2 ? launch_screen<2>(task, stream) : launch_screen<1>(task, stream);
  if (error != cudaSuccess) return error;
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  multiply_candidates_kernel<T, kPositions>
      <<<static_cast<unsigned>(multiprocessors * kBlocksPerMultiprocessor), kThreadsPerBlock, 0, stream>>>(task);
  error = launch_head_tiles(task.head, stream);
  if (error != cudaSuccess) return error;
  constexpr int kMaxWalkers = 1024;
  const int batch = task.head.rows.batch;
  const dim3 grid(static_cast<unsigned>(ceil_div(vocabulary, kThreadsPerBlock)),
                  static_cast<unsigned>(batch < kMaxWalkers ? batch : kMaxWalkers));
  store_kernel<T, kPositions><<<grid, kThreadsPerBlock, 0, stream>>>(task);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_type(const ScreenedTask& task, int64_t multiprocessors, cudaStream_t stream) {
  return task.head.outputs.max_logits != nullptr ? launch_all<T, true>(task, multiprocessors, stream)
                                                 : launch_all<T, false>(task, multiprocessors, stream);
}

}  // namespace

cudaError_t launch_screened_head(const ScreenedTask& task, int64_t multiprocessors, cudaStream_t stream) {
  return task.head.operand == hopper::Operand::kBfloat16 ? launch_type<__nv_bfloat16>(task, multiprocessors, stream)
                                                         : launch_type<__half>(task, multiprocessors, stream);
}

}  // namespace splade_fast::cuda::sm90
