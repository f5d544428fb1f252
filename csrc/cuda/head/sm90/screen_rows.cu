// Rounds rows to int8: h - mean, or w, rotated by random signs and Hadamard transforms of blocks, then divided by a
// scale. A warp takes a row, and a lane some consecutive dimensions of a block, which stays in registers. A row is
// rotated twice, to find its largest entry and to round it: reading it again from the second-level cache is cheaper
// than keeping it. The scale of a token is that of its tile, so a launch finds the largest entries of all before the
// next one rounds them.
#include <cfloat>

#include "cuda/device.cuh"
#include "cuda/head/sm90/pack.cuh"
#include "cuda/head/sm90/screen_rows.h"
#include "cuda/warp.cuh"

namespace splade_fast::cuda {
namespace {

constexpr int kThreads = packing::kThreads;
constexpr int kBlocks = 2;  // that certainly fit a multiprocessor; more would cost spills

// Unnormalised Hadamard transform of 32 kPerLane values.
template <int kPerLane>
__device__ void hadamard(float (&x)[kPerLane], int lane) {
#pragma unroll
  for (int half = 1; half < kPerLane; half *= 2) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i & half) continue;
      const float a = x[i], b = x[i + half];
      x[i] = a + b;
      x[i + half] = a - b;
    }
  }
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, x[i], step);
      x[i] = lane & step ? other - x[i] : x[i] + other;
    }
  }
}

// Reads and rotates the rows of one matrix.
template <typename T>
struct Rows {
  const T* rows;
  int dim, padded_dim;
  const float* mean;  // null: nothing is subtracted

  __device__ Rows(const RowsToRound& given, bool minus_mean)
      : rows(static_cast<const T*>(given.rows)),
        dim(static_cast<int>(given.dim)),
        padded_dim(static_cast<int>(screen_padded_dim(given.dim))),
        mean(minus_mean ? given.mean : nullptr) {}

  // Calls use(first dimension, values of this lane) for every block of a row.
  template <int kPerLane, typename Use>
  __device__ void for_rotated(int64_t row, Use use) const {
    constexpr int kBlock = kWarp * kPerLane, kVector = kPerLane < kMaxVector<T> ? kPerLane : kMaxVector<T>;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const float norm = 1.0f / sqrtf(static_cast<float>(kBlock));
    const T* source = rows + row * dim;
#pragma unroll 1
    for (int block = 0; block < padded_dim; block += kBlock) {
      const int first = block + lane * kPerLane;
      float x[kPerLane];
#pragma unroll
      for (int i = 0; i < kPerLane; i += kVector) {
        Vector<T, kVector> vector;
        const bool inside = first + i < dim;
        if (inside) vector = load_vector<kVector>(source + first + i);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const int d = first + i + j;
          const float value = inside ? to_acc(vector.element[j]) - (mean != nullptr ? mean[d] : 0.0f) : 0.0f;
          x[i + j] = value * (screen_sign(d) * norm);
        }
      }
      hadamard(x, lane);
      use(first, x);
    }
  }

  // Returns the largest entry of a rotated row; inf if the row is not finite or too large to round.
  template <int kPerLane>
  __device__ float largest(int64_t row) const {
    float largest = 0;
    for_rotated<kPerLane>(row, [&](int, const float (&x)[kPerLane]) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const float size = fabsf(x[i]);
        largest = size <= kScreenLargest ? fmaxf(largest, size) : INFINITY;
      }
    });
    return warp_max(largest);
  }
};

__device__ bool is_finite(float largest) { return largest <= kScreenLargest; }

// Whether a row is rounded; otherwise the whole row is residual.
__device__ bool is_rounded(float largest) { return is_finite(largest) && largest >= kScreenSmallest; }

// Upper bounds of the norms of the residual and of the row, rounded or not.
struct Norms {
  float residual, norm;
};

// Writes a row of integers. shared_largest: the entry that determines the scale, at least the largest of the row.
template <int kPerLane, typename T>
__device__ Norms round_row(const Rows<T>& rows, int64_t row, float largest, float shared_largest, int8_t* target) {
  const bool rounds = is_rounded(largest);
  const float scale = screen_scale(shared_largest), inverse = rounds ? kScreenLevels / shared_largest : 0.0f;
  float lost_squares = 0, squares = 0;
  rows.template for_rotated<kPerLane>(row, [&](int first, const float (&x)[kPerLane]) {
    constexpr int kVector = kPerLane < kVectorBytes ? kPerLane : kVectorBytes;
#pragma unroll
    for (int i = 0; i < kPerLane; i += kVector) {
      Vector<int8_t, kVector> integers;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const float value = rounds ? x[i + j] : 0.0f, level = rintf(value * inverse), lost = value - scale * level;
        lost_squares += lost * lost;
        squares += value * value;
        integers.element[j] = static_cast<int8_t>(level);
      }
      store_vector(target + first + i, integers);
    }
  });
  lost_squares = warp_sum(lost_squares);
  squares = warp_sum(squares);
  const float inflation = screen_inflation(rows.padded_dim);
  const float whole = is_finite(largest) ? largest * sqrtf(static_cast<float>(rows.padded_dim)) : INFINITY;
  const float residual = (rounds ? sqrtf(lost_squares) : whole) * inflation;
  return {residual, (rounds ? sqrtf(squares) : whole) * inflation + residual};
}

// Returns an upper bound of the norm of a float vector, computed by a warp.
__device__ float norm_of(const float* vector, int dim) {
  float squares = 0;
  for (int d = static_cast<int>(threadIdx.x) % kWarp; d < dim; d += kWarp) squares += vector[d] * vector[d];
  return sqrtf(warp_sum(squares)) * screen_inflation(dim);
}

template <typename T, int kPerLane>
__global__ void __launch_bounds__(kThreads, kBlocks) round_weight_kernel(const WeightToRound task) {
  const Rows<T> rows(task.weight, false);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t entry = packing::warp_of_grid(); entry < task.vocabulary; entry += packing::warps_of_grid()) {
    const T* source = rows.rows + entry * rows.dim;
    float mean_dot = 0;
    for (int d = lane; d < rows.dim; d += kWarp) mean_dot += task.weight.mean[d] * to_acc(source[d]);
    mean_dot = warp_sum(mean_dot);
    const float largest = rows.template largest<kPerLane>(entry);
    const bool rounds = is_rounded(largest);
    const Norms norms =
        round_row<kPerLane>(rows, entry, largest, rounds ? largest : 0.0f, task.integers + entry * rows.padded_dim);
    if (lane > 0) continue;
    const auto keep = [&](WeightFact fact, float value) { task.facts[fact * task.vocabulary + entry] = value; };
    keep(kWeightScale, rounds ? screen_scale(largest) : 0.0f);
    keep(kWeightResidual, norms.residual + kScreenTiny);
    keep(kWeightNorm, norms.norm);
    keep(kWeightMeanDot, mean_dot);
    keep(kWeightSample, to_acc(source[sampled_dim(entry, rows.dim)]));
  }
}

// Stores the maximum over several warps of values that are neither negative nor NaN.
__device__ void merge_largest(float* target, float value) {
  atomicMax(reinterpret_cast<unsigned*>(target), to_bits(value));
}

// All threads of the grid.
template <typename T>
__device__ void describe_entries(const EntriesToDescribe& task, int64_t dim) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t entry = first; entry < task.vocabulary; entry += stride) {
    const auto fact = [&](WeightFact which) { return task.facts[which * task.vocabulary + entry]; };
    const float bias = task.bias == nullptr ? 0.0f : to_acc(static_cast<const T*>(task.bias)[entry]);
    task.entries[entry] = {screen_threshold(bias, fact(kWeightMeanDot)), fact(kWeightScale), fact(kWeightNorm),
                           fact(kWeightResidual)};
    const float sample = to_acc(static_cast<const T*>(task.weight)[entry * dim + sampled_dim(entry, dim)]);
    if (to_bits(sample) != to_bits(fact(kWeightSample))) atomicMax(task.count, task.too_many);
  }
}

// Beside the packing, the largest blocks leave no registers for kBlocks.
template <typename T, int kPerLane>
__global__ void __launch_bounds__(kThreads, kPerLane < 32 ? kBlocks : 1)
    measure_tokens_kernel(const PackTask pack, int parts, const TokensToRound task) {
  RowsToRound unpacked = task.tokens;
  unpacked.rows = pack.rows;
  const Rows<T> rows(unpacked, true);
  const auto measure = [&](int64_t row, int64_t token) {
    const float largest = rows.template largest<kPerLane>(row);
    if (threadIdx.x % kWarp == 0) task.largest[token] = largest;
  };
  packing::pack(pack, parts, [&](int64_t row, int64_t token) {
    packing::move_row(pack, row, token);
    measure(row, token);
  });
  if (pack.mask != nullptr) return;
  const int64_t count = sequence_span(pack.sequences, pack.batch - 1).stop;
  for (int64_t token = packing::warp_of_grid(); token < count; token += packing::warps_of_grid()) measure(token, token);
}

// The largest entry of the tokens of a tile that are rounded at all; 0: none. A warp reads what was found of each.
__device__ float largest_of_tile(const TokensToRound& task, int64_t first, int64_t count) {
  const int64_t end = min(first + task.tile_tokens, count);
  float largest = 0;
#pragma unroll 8
  for (int64_t token = first + threadIdx.x % kWarp; token < end; token += kWarp) {
    const float one = task.largest[token];
    largest = fmaxf(largest, is_rounded(one) ? one : 0.0f);
  }
  return warp_max(largest);
}

template <typename T, int kPerLane>
__global__ void __launch_bounds__(kThreads, kBlocks)
    round_tokens_kernel(const TokensToRound task, const EntriesToDescribe entries) {
  const Rows<T> rows(task.tokens, true);
  describe_entries<T>(entries, rows.dim);
  const float rounding = screen_rounding(rows.dim), mean_norm = norm_of(rows.mean, rows.dim);
  const int64_t count = *task.count, end = min(round_up(count, task.tile_tokens), task.room);
  for (int64_t token = packing::warp_of_grid(); token < end; token += packing::warps_of_grid()) {
    if (token >= count) {
      int32_t* target = reinterpret_cast<int32_t*>(task.integers + token * rows.padded_dim);
      for (int i = static_cast<int>(threadIdx.x) % kWarp; i < rows.padded_dim / 4; i += kWarp) target[i] = 0;
      continue;
    }
    const int64_t tile = token / task.tile_tokens, first = tile * task.tile_tokens;
    const float largest = largest_of_tile(task, first, count);
    const Norms norms =
        round_row<kPerLane>(rows, token, task.largest[token], largest, task.integers + token * rows.padded_dim);
    if (threadIdx.x % kWarp > 0) continue;
    ScreenTile& facts = task.tiles[tile];
    if (token == first) facts.largest = largest;
    const float residual = norms.residual + (rounding * (norms.norm + mean_norm) + kScreenTiny);
    merge_largest(&facts.norm, norms.norm);
    // With a mean that is not finite nothing is proved.
    merge_largest(&facts.residual, residual <= FLT_MAX ? residual : INFINITY);
  }
}

// Launchers ------------------------------------------------------------------------------------------------------

// Calls launch(Type<T>, Constant<values per lane>, blocks) for the type of the rows, the size of a rotated block and a
// number of warps.
template <typename Launch>
cudaError_t dispatch_rows(const RowsToRound& rows, int64_t warps, int64_t multiprocessors, Launch launch) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  const int64_t blocks = ceil_div(warps, kThreads / kWarp), most = multiprocessors * kBlocksPerMultiprocessor;
  const unsigned grid = static_cast<unsigned>(blocks < most ? blocks : most);
  const auto with_type = [&](auto type) {
    switch (screen_block(screen_padded_dim(rows.dim)) / kWarp) {
      case 2:
        return launch(type, Constant<2>{}, grid);
      case 4:
        return launch(type, Constant<4>{}, grid);
      case 8:
        return launch(type, Constant<8>{}, grid);
      case 16:
        return launch(type, Constant<16>{}, grid);
      default:
        static_assert(kScreenMaxBlock == 32 * kWarp);
        return launch(type, Constant<32>{}, grid);
    }
  };
  rows.is_bfloat16 ? with_type(__nv_bfloat16{}) : with_type(__half{});
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_round_weight(const WeightToRound& task, int64_t multiprocessors, cudaStream_t stream) {
  return dispatch_rows(task.weight, task.vocabulary, multiprocessors, [&](auto type, auto per_lane, unsigned grid) {
    using T = decltype(type);
    constexpr int kPerLane = decltype(per_lane)::value;
    round_weight_kernel<T, kPerLane><<<grid, kThreads, 0, stream>>>(task);
  });
}

cudaError_t launch_round_tokens(const PackTask& pack, const TokensToRound& task, const EntriesToDescribe& entries,
                                int64_t multiprocessors, cudaStream_t stream) {
  const packing::Grid packs = packing::grid_of(pack, multiprocessors);
  const int64_t entry_warps = ceil_div(entries.vocabulary, kWarp);
  const int64_t warps = entry_warps > task.room ? entry_warps : task.room;
  return dispatch_rows(task.tokens, warps, multiprocessors, [&](auto type, auto per_lane, unsigned grid) {
    using T = decltype(type);
    constexpr int kPerLane = decltype(per_lane)::value;
    measure_tokens_kernel<T, kPerLane><<<packs.blocks, kThreads, 0, stream>>>(pack, packs.parts, task);
    round_tokens_kernel<T, kPerLane><<<grid, kThreads, 0, stream>>>(task, entries);
  });
}

}  // namespace splade_fast::cuda
