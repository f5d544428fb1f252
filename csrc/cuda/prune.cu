// prune on CUDA: dense rows (B, V) -> the entries to keep.
//
// A block per row: selection.cuh finds the entries in about one coalesced pass. Where fewer than k exceed the
// threshold, it selects nothing.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/prune.h"
#include "cuda/common.cuh"
#include "cuda/selection.cuh"

namespace splade_fast::cuda {
namespace {

using selection::kThreads;

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

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) prune_kernel(const PruneTask task) {
  using Acc = Accumulator<T>;
  using Key = OrderedKey<Acc>;
  __shared__ selection::Shared<Key> shared;
  const int64_t b = blockIdx.x;
  const T* row = static_cast<const T*>(task.x) + b * task.row_stride;
  // Rounded as PyTorch rounds a number that is compared with a tensor. No value has key 0.
  const Acc threshold = to_acc(from_acc<T>(static_cast<Acc>(task.threshold)));
  const Key floor = threshold != threshold ? Key(0) : to_key(threshold);
  const auto least = [&](Key largest) {
    if (task.max_ratio < 0) return Key(0);
    const Acc whole = from_key<Acc>(selection::block_max(shared, largest));
    const Acc least = to_acc(from_acc<T>(whole * static_cast<Acc>(task.max_ratio)));
    return least == least ? to_key(least) : Key(0);  // no key is less than that of NaN
  };
  T* values = static_cast<T*>(task.values) + b * task.width;
  int32_t* indices = task.indices + b * task.width;
  const auto load = [&](int column) { return to_key(to_acc(row[column])); };
  const auto store = [&](int column, Key, int place) {
    values[place] = row[column];
    indices[place] = column;
  };
  const int length = selection::select_largest(shared, task.columns, task.k, floor, load, least, store).count;
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
