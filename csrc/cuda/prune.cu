// prune on CUDA: dense rows (B, V) -> the entries to keep.
//
// A block per row. One coalesced pass compacts the entries above the threshold into shared memory, in the order of
// their columns. A row with at most k of them is finished; otherwise a radix selection finds the k-th largest among
// them, or in the row itself, read again from global memory, where the buffer is too small. A last pass writes the
// remaining entries, again in order.
#include <torch/csrc/stable/library.h>

#include <climits>
#include <tuple>

#include "common/float_bits.h"
#include "common/prune.h"
#include "cuda/common.cuh"
#include "cuda/warp.cuh"

namespace splade_fast::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kItems = 8;               // per thread, between two agreements of the block on places
constexpr int kBufferBytes = 32 << 10;  // candidates of a row
constexpr int kDigitBits = 8, kBins = 1 << kDigitBits;

template <typename Acc>
constexpr int kCapacity = kBufferBytes / static_cast<int>(sizeof(OrderedKey<Acc>) + sizeof(int32_t));

struct PruneTask {
  const void* x;
  int64_t row_stride;
  int columns;
  int k;             // number of columns where there is no limit
  double threshold;  // NaN: none
  double max_ratio;  // negative: none
  int64_t width;
  void* values;
  int32_t* indices;
  int32_t* lengths;
};

template <typename Acc>
struct Shared {
  OrderedKey<Acc> key[kCapacity<Acc>];
  int32_t column[kCapacity<Acc>];
  OrderedKey<Acc> largest[kWarps];
  unsigned counts[2][kItems * kWarps];
  unsigned total[2];
  int histogram[kBins];
  int digit, remaining;
};

// An entry is kept for certain, or as one of several ties. One integer counts both: a tile has fewer than 2^16 entries.
constexpr unsigned kCertain = 1, kTie = 1 << 16;

struct Counts {
  int certain, ties;
};

// Calls classify(i, key) for 0 <= i < count, which sets the key and returns 0, kCertain or kTie. Then calls place(i,
// key, class, counts of the entries in front) for each entry with another class than 0. Returns the counts of all
// entries.
template <typename Acc, typename Classify, typename Place>
__device__ Counts in_order(Shared<Acc>& shared, int count, Classify classify, Place place) {
  constexpr int kTile = kThreads * kItems, kPerLane = kItems * kWarps / kWarp;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const unsigned lower_lanes = (1u << lane) - 1;
  Counts before{0, 0};
  int turn = 0;  // two sets of counts, so that no tile waits until all threads have read those of the last
  for (int64_t tile = 0; tile < count; tile += kTile, turn ^= 1) {
    OrderedKey<Acc> key[kItems];
    unsigned kind[kItems], offset[kItems];
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int64_t i = tile + j * kThreads + threadIdx.x;
      key[j] = 0;
      kind[j] = i < count ? classify(static_cast<int>(i), key[j]) : 0;
    }
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const unsigned certain = __ballot_sync(kAllLanes, kind[j] == kCertain);
      const unsigned ties = __ballot_sync(kAllLanes, kind[j] == kTie);
      offset[j] = __popc(certain & lower_lanes) * kCertain + __popc(ties & lower_lanes) * kTie;
      if (lane == 0) shared.counts[turn][j * kWarps + warp] = __popc(certain) * kCertain + __popc(ties) * kTie;
    }
    __syncthreads();
    if (warp == 0) {
      unsigned own[kPerLane], sum = 0;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        own[j] = sum;
        sum += shared.counts[turn][lane * kPerLane + j];
      }
      unsigned through = sum;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const unsigned other = __shfl_up_sync(kAllLanes, through, step);
        if (lane >= step) through += other;
      }
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) shared.counts[turn][lane * kPerLane + j] = through - sum + own[j];
      if (lane == kWarp - 1) shared.total[turn] = through;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (kind[j] == 0) continue;
      const unsigned here = shared.counts[turn][j * kWarps + warp] + offset[j];
      place(static_cast<int>(tile + j * kThreads + threadIdx.x), key[j], kind[j],
            Counts{before.certain + static_cast<int>(here % kTie), before.ties + static_cast<int>(here / kTie)});
    }
    before.certain += static_cast<int>(shared.total[turn] % kTie);
    before.ties += static_cast<int>(shared.total[turn] / kTie);
  }
  return before;
}

template <typename Acc>
struct Cut {
  OrderedKey<Acc> kth;
  int ties;  // number of entries equal to the k-th largest among the k largest
};

// The k-th largest key, digit by digit. load_key(i, key) sets the key and returns whether entry i takes part.
template <typename Acc, typename LoadKey>
__device__ Cut<Acc> select_kth(Shared<Acc>& shared, int count, int k, LoadKey load_key) {
  constexpr int kBits = 8 * sizeof(OrderedKey<Acc>), kPerLane = kBins / kWarp;
  const int lane = threadIdx.x % kWarp;
  OrderedKey<Acc> prefix = 0;
  int remaining = k;
  for (int shift = kBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared.histogram[bin] = 0;
    __syncthreads();
    // The digits above this one. Two shifts, since a shift by all bits is undefined.
    const OrderedKey<Acc> known = prefix >> shift >> kDigitBits;
    for (int64_t tile = 0; tile < count; tile += kThreads) {
      const int64_t i = tile + threadIdx.x;
      OrderedKey<Acc> key = 0;
      const bool is_counted = i < count && load_key(static_cast<int>(i), key) && key >> shift >> kDigitBits == known;
      const int digit = is_counted ? static_cast<int>(key >> shift) & (kBins - 1) : kBins;
      // Most leading digits are the same: one atomic serves all lanes that agree.
      const unsigned peers = __match_any_sync(kAllLanes, digit);
      if (is_counted && lane == __ffs(peers) - 1) atomicAdd(&shared.histogram[digit], __popc(peers));
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
      const int highest = kBins - 1 - lane * kPerLane;  // lane 0 has the largest digits
      int sum = 0;
      for (int j = 0; j < kPerLane; ++j) sum += shared.histogram[highest - j];
      int through = sum;
      for (int step = 1; step < kWarp; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, through, step);
        if (lane >= step) through += other;
      }
      int above = through - sum;
      if (above < remaining && through >= remaining) {
        int digit = highest;
        while (above + shared.histogram[digit] < remaining) above += shared.histogram[digit--];
        shared.digit = digit;
        shared.remaining = remaining - above;
      }
    }
    __syncthreads();
    prefix |= static_cast<OrderedKey<Acc>>(shared.digit) << shift;
    remaining = shared.remaining;
  }
  return {prefix, remaining};
}

template <typename Acc>
__device__ OrderedKey<Acc> block_max(Shared<Acc>& shared, OrderedKey<Acc> key) {
  for (int step = kWarp / 2; step > 0; step /= 2) key = max(key, __shfl_xor_sync(kAllLanes, key, step));
  if (threadIdx.x % kWarp == 0) shared.largest[threadIdx.x / kWarp] = key;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) key = max(key, shared.largest[warp]);
  return key;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) prune_kernel(const PruneTask task) {
  using Acc = Accumulator<T>;
  __shared__ Shared<Acc> shared;
  const int64_t b = blockIdx.x;
  const T* row = static_cast<const T*>(task.x) + b * task.row_stride;
  // Rounded as PyTorch rounds a number that is compared with a tensor.
  const Acc threshold = to_acc(from_acc<T>(static_cast<Acc>(task.threshold)));
  const auto from_row = [&](int column, OrderedKey<Acc>& key) {
    const Acc value = to_acc(row[column]);
    key = to_key(value);
    return !(value <= threshold);
  };

  OrderedKey<Acc> largest = 0;
  const int found =
      in_order(
          shared, task.columns, [&](int column, OrderedKey<Acc>& key) { return from_row(column, key) ? kCertain : 0u; },
          [&](int column, OrderedKey<Acc> key, unsigned, Counts before) {
            largest = max(largest, key);
            if (before.certain < kCapacity<Acc>) {
              shared.key[before.certain] = key;
              shared.column[before.certain] = column;
            }
          })
          .certain;
  __syncthreads();
  const bool in_buffer = found <= kCapacity<Acc>;

  Cut<Acc> cut{0, INT_MAX};
  if (found > task.k) {
    cut = in_buffer ? select_kth(shared, found, task.k,
                                 [&](int i, OrderedKey<Acc>& key) {
                                   key = shared.key[i];
                                   return true;
                                 })
                    : select_kth(shared, task.columns, task.k, from_row);
  }
  if (task.max_ratio >= 0) {
    const Acc least = to_acc(from_acc<T>(from_key<Acc>(block_max(shared, largest)) * static_cast<Acc>(task.max_ratio)));
    // Entries larger than the k-th are among the k largest. No key is less than that of NaN.
    if (least == least && to_key(least) > cut.kth) cut = {to_key(least), INT_MAX};
  }

  T* values = static_cast<T*>(task.values) + b * task.width;
  int32_t* indices = task.indices + b * task.width;
  const auto kind = [&](OrderedKey<Acc> key) { return key > cut.kth ? kCertain : key == cut.kth ? kTie : 0u; };
  const auto write = [&](int column, unsigned kind_of_entry, Counts before) {
    if (kind_of_entry == kTie && before.ties >= cut.ties) return;
    const int place = before.certain + min(before.ties, cut.ties);
    values[place] = row[column];
    indices[place] = column;
  };
  const Counts kept =
      in_buffer ? in_order(
                      shared, found,
                      [&](int i, OrderedKey<Acc>& key) {
                        key = shared.key[i];
                        return kind(key);
                      },
                      [&](int i, OrderedKey<Acc>, unsigned kind_of_entry, Counts before) {
                        write(shared.column[i], kind_of_entry, before);
                      })
                : in_order(
                      shared, task.columns,
                      [&](int column, OrderedKey<Acc>& key) { return from_row(column, key) ? kind(key) : 0u; },
                      [&](int column, OrderedKey<Acc>, unsigned kind_of_entry, Counts before) {
                        write(column, kind_of_entry, before);
                      });
  const int length = kept.certain + min(kept.ties, cut.ties);
  if (threadIdx.x == 0) task.lengths[b] = length;
  for (int64_t place = length + static_cast<int64_t>(threadIdx.x); place < task.width; place += kThreads) {
    values[place] = from_acc<T>(Acc(0));
    indices[place] = -1;
  }
}

// Host function --------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> prune_rows(const Tensor& x, std::optional<int64_t> k,
                                              std::optional<double> threshold, std::optional<double> max_ratio,
                                              std::optional<double> mass) {
  const char* op = "prune_rows";
  const Criteria criteria = check_criteria(x, k, threshold, max_ratio, mass);
  STD_TORCH_CHECK(!mass, "mass has no CUDA kernel: SparseRows.from_dense applies it to the candidates");
  const int64_t batch = x.size(0), columns = x.size(1), width = criteria.width(columns);
  const OnDevice device(x, op);
  const std::vector<int64_t> shape{batch, width};
  const Tensor values = new_tensor(x, shape);
  const Tensor indices = new_tensor(x, shape, ScalarType::Int);
  Tensor lengths = new_tensor(x, std::vector<int64_t>{batch}, ScalarType::Int);
  if (values.numel() == 0) {
    torch::stable::zero_(lengths);
    return {values, indices, lengths};
  }
  const Tensor dense = contiguous_rows(x);
  PruneTask task{};
  task.x = dense.const_data_ptr();
  task.row_stride = dense.stride(0);
  task.columns = static_cast<int>(columns);
  task.k = static_cast<int>(width);
  task.threshold = threshold.value_or(NAN);
  task.max_ratio = max_ratio.value_or(-1);
  task.width = width;
  task.values = values.mutable_data_ptr();
  task.indices = mutable_data<int32_t>(indices);
  task.lengths = mutable_data<int32_t>(lengths);
  dispatch_floating(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    prune_kernel<T><<<grid_size(batch), kThreads, 0, device.stream()>>>(task);
  });
  check_launch(op);
  return {values, indices, lengths};
}

}  // namespace
}  // namespace splade_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CUDA, m) { m.impl("prune_rows", TORCH_BOX(&splade_fast::cuda::prune_rows)); }
