// head forward on sm_90a, screened: an int8 product leaves a list of pairs of token and entry that may have a positive
// logit, and these alone are multiplied in full precision. docs/screening.md derives the bound. Where the list is too
// short for what is left, the kernels of head_sm90.cu, launched behind, compute everything: the host is not asked.
#include "cuda/head/sm90/merge_key.cuh"
#include "cuda/head/sm90/product.cuh"
#include "cuda/head/sm90/screened.h"
#include "cuda/warp.cuh"

namespace splade_fast::cuda::sm90 {
namespace {

constexpr int kThreadsPerBlock = 256;

__device__ bool too_many(const ScreenedTask& task) {
  return *task.count > static_cast<unsigned long long>(task.capacity);
}

// The entries with this call's bias. A weight that is not what was rounded gives itself away, and counts as too many
// candidates.
template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock) describe_entries_kernel(const ScreenedTask task) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreadsPerBlock + threadIdx.x;
  const int64_t vocabulary = task.head.shape.vocabulary, depth = task.head.shape.depth;
  if (entry >= vocabulary) return;
  const auto fact = [&](WeightFact which) { return task.weight_facts[which * vocabulary + entry]; };
  const float bias =
      task.head.outputs.bias == nullptr ? 0.0f : to_acc(static_cast<const T*>(task.head.outputs.bias)[entry]);
  task.entries[entry] = {screen_threshold(bias, fact(kWeightMeanDot)), fact(kWeightScale), fact(kWeightNorm),
                         fact(kWeightResidual)};
  const float sample = to_acc(static_cast<const T*>(task.head.weight)[entry * depth + sampled_depth(entry, depth)]);
  if (to_bits(sample) != to_bits(fact(kWeightSample))) {
    atomicMax(task.count, static_cast<unsigned long long>(task.capacity) + 1);
  }
}

#if defined(SPLADE_FAST_SM90A)

// Makes room for so many candidates of each lane; returns where this lane's begin.
__device__ unsigned long long reserve(unsigned long long* count, int found) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int before = found;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int lower = __shfl_up_sync(kAllLanes, before, step);
    if (lane >= step) before += lower;
  }
  const int total = __shfl_sync(kAllLanes, before, kWarp - 1);
  unsigned long long first = 0;
  if (lane == 0) first = atomicAdd(count, static_cast<unsigned long long>(total));
  return __shfl_sync(kAllLanes, first, 0) + static_cast<unsigned long long>(before - found);
}

// Collects the candidates of the tiles of the product.
struct Collector {
  const ScreenedTask& task;
  int threshold[2] = {INT_MAX, INT_MAX};  // of this thread's entries, in the tile at hand

  // Before the product, which the loads need not wait for.
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
    __syncwarp();  // wgmma wants whole warps
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
  // Not even where there are too many from the start may a block end early: the count grows meanwhile, and those of a
  // cluster would not agree.
  Collector collector{task};
  multiply_tiles<hopper::Operand::kInt8, kCluster>(
      weight_map, token_map, static_cast<int>(task.head.shape.vocabulary), task.head.rows.starts[task.head.rows.batch],
      static_cast<int>(screen_padded_dim(task.head.shape.depth)), collector);
#endif
}

// A warp takes a candidate. In float32, and always in the same order, so that nothing depends on how the list is.
template <typename T, bool kPositions>
__global__ void __launch_bounds__(kThreadsPerBlock) multiply_candidates_kernel(const ScreenedTask task) {
  if (too_many(task)) return;
  constexpr int kVector = kMaxVector<T>;
  const HeadTask& head = task.head;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kThreadsPerBlock / kWarp, count = *task.count;
  const int64_t depth = head.shape.depth;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreadsPerBlock + threadIdx.x) / kWarp; i < count; i += warps) {
    const Candidate candidate = task.candidates[i];
    const T* token = static_cast<const T*>(head.tokens) + candidate.row * depth;
    const T* entry = static_cast<const T*>(head.weight) + candidate.entry * depth;
    float sum = 0;
#pragma unroll 4
    for (int64_t d = lane * kVector; d < depth; d += kWarp * kVector) {
      const Vector<T, kVector> a = load_vector<kVector>(token + d), b = load_vector<kVector>(entry + d);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum += to_acc(a.element[j]) * to_acc(b.element[j]);
    }
    sum = warp_sum(sum);
    const int sequence = first_sequence_after(head.rows.starts, head.rows.batch, candidate.row);
    // Starts that do not rise may leave a row to no sequence.
    if (lane > 0 || sequence >= head.rows.batch || candidate.row < head.rows.starts[sequence]) continue;
    const int position = kPositions ? head.rows.position(sequence, candidate.row) : 0;
    merge_key(static_cast<Key<kPositions>*>(head.keys) + sequence * head.shape.vocabulary + candidate.entry,
              make_key<kPositions>(sum, static_cast<uint32_t>(position)));
  }
}

// An entry without candidates has no positive logit: its maximum is given as 0. blockIdx.y walks over the sequences.
template <typename T, bool kPositions>
__global__ void __launch_bounds__(kThreadsPerBlock) finish_kernel(const ScreenedTask task) {
  const HeadTask& head = task.head;
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreadsPerBlock + threadIdx.x;
  const bool declined = too_many(task);
  if (entry == 0 && blockIdx.y == 0) {
    task.report[0] = declined;
    task.report[1] = 0;
    task.report[2] = declined ? 0 : static_cast<int64_t>(*task.count);
    task.report[3] = 100;
  }
  if (entry >= head.shape.vocabulary || declined) return;
  for (int b = static_cast<int>(blockIdx.y); b < head.rows.batch; b += static_cast<int>(gridDim.y)) {
    const auto key = static_cast<const Key<kPositions>*>(head.keys)[b * head.shape.vocabulary + entry];
    const bool found = key != 0;
    store_maximum<T>(head.outputs, b, entry, found ? value_of(key) : 0.0f,
                     found ? static_cast<int>(position_of(key)) : 0, found);
  }
}

// Launchers ------------------------------------------------------------------------------------------------------

template <int kCluster>
cudaError_t launch_screen(const ScreenedTask& task, cudaStream_t stream) {
  const Shape& shape = task.head.shape;
  return launch_product<hopper::Operand::kInt8, kCluster>(
      screen_sm90_kernel<kCluster>, {task.weight, task.tokens},
      {shape.rows, shape.batch, shape.vocabulary, screen_padded_dim(shape.depth)}, task, stream);
}

template <typename T, bool kPositions>
cudaError_t launch_all(const ScreenedTask& task, int64_t multiprocessors, cudaStream_t stream) {
  const int64_t vocabulary = task.head.shape.vocabulary;
  const unsigned columns = static_cast<unsigned>(ceil_div(vocabulary, kThreadsPerBlock));
  describe_entries_kernel<T><<<columns, kThreadsPerBlock, 0, stream>>>(task);
  const cudaError_t error =
      choose_cluster(vocabulary) == 2 ? launch_screen<2>(task, stream) : launch_screen<1>(task, stream);
  if (error != cudaSuccess) return error;
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  multiply_candidates_kernel<T, kPositions>
      <<<static_cast<unsigned>(multiprocessors * kBlocksPerMultiprocessor), kThreadsPerBlock, 0, stream>>>(task);
  constexpr int kMaxWalkers = 1024;
  const int batch = task.head.rows.batch;
  const dim3 grid(columns, static_cast<unsigned>(batch < kMaxWalkers ? batch : kMaxWalkers));
  finish_kernel<T, kPositions><<<grid, kThreadsPerBlock, 0, stream>>>(task);
  return launch_head(task.head, stream);
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
