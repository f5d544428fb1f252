// prune on the CPU: dense rows (B, V) -> the entries to keep.
//
// One pass over a row collects what may be kept. With k the buffer holds only about 2 k entries: whenever it is
// full the k largest stay, and the smallest of them is the threshold of what follows, because a later equal entry would
// lose the tie. So dense rows cost about one read as well, and every row fits.
#include "../common/prune.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "memory.h"

namespace splade_fast::cpu {
namespace {

template <typename T>
struct Row {
  std::vector<int32_t> columns;
  std::vector<T> values;
};

template <typename T>
Accumulator<T> rounded(Accumulator<T> value) {
  T stored;
  kernels<T>().store(&stored, &value, 1);
  kernels<T>().load(&value, &stored, 1);
  return value;
}

// How many candidates there may be at once.
template <typename T>
int64_t capacity(const Criteria& criteria, int64_t columns) {
  constexpr int64_t kSlack = Candidates<Accumulator<T>>::kSlack, kEnough = 512;
  const int64_t all = columns + kSlack;
  // The sum that mass refers to is that of all candidates.
  return criteria.k && !criteria.mass ? std::min(all, std::max(2 * *criteria.k, kEnough) + kSlack) : all;
}

// collect() with the entries that are not <= threshold of a row, or with the k largest of them.
template <typename T>
void collect_row(const T* row, int64_t columns, const Criteria& criteria, Candidates<Accumulator<T>>& found) {
  using Acc = Accumulator<T>;
  const Kernels<T>& kernel = kernels<T>();
  // No threshold: NaN, which nothing is at most.
  Acc threshold = std::numeric_limits<Acc>::quiet_NaN();
  if (criteria.threshold) threshold = rounded<T>(static_cast<Acc>(*criteria.threshold));
  const bool largest_only = criteria.k && !criteria.mass;
  found.count = 0;
  if (largest_only && *criteria.k == 0) return;
  for (int64_t column = kernel.collect(row, 0, columns, threshold, found);;
       column = kernel.collect(row, column, columns, threshold, found)) {
    if (largest_only && found.count > *criteria.k) {
      threshold = kernel.keep_largest(found, *criteria.k);
      if (threshold != threshold) return;  // k times NaN
    }
    if (column == columns) return;
  }
}

template <typename Acc>
void keep_where(Candidates<Acc>& found, const std::vector<char>& keep) {
  int64_t kept = 0;
  for (int64_t i = 0; i < found.count; ++i) {
    found.value[kept] = found.value[i];
    found.column[kept] = found.column[i];
    kept += keep[i];
  }
  found.count = kept;
}

// NaN comes first, of equal values the first.
template <typename Acc>
std::vector<int32_t> ranked(const Candidates<Acc>& found) {
  std::vector<int32_t> order(found.count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const Acc x = found.value[a], y = found.value[b];
    return x > y || (x != x && y == y);
  });
  return order;
}

// Every comparison is false for NaN, which keeps the entry.
template <typename T>
void apply(const Criteria& criteria, Candidates<Accumulator<T>>& found) {
  using Acc = Accumulator<T>;
  std::vector<char> keep(found.count, 1);
  if (criteria.mass) {
    const std::vector<int32_t> order = ranked(found);
    double total = 0, through = 0;
    for (const int32_t i : order) total += found.value[i];
    const int64_t limit = criteria.k ? *criteria.k : found.count;
    for (int64_t rank = 0; rank < found.count; ++rank) {
      const double value = found.value[order[rank]];
      through += value;
      keep[order[rank]] = rank < limit && !(through - value >= *criteria.mass * total);
    }
  }
  if (criteria.max_ratio && found.count > 0) {
    Acc largest = found.value[0];
    for (int64_t i = 1; i < found.count; ++i) {
      const Acc value = found.value[i];
      largest = value > largest || value != value ? value : largest;
      if (largest != largest) break;
    }
    const Acc least = rounded<T>(largest * static_cast<Acc>(*criteria.max_ratio));
    for (int64_t i = 0; i < found.count; ++i) keep[i] = keep[i] && !(found.value[i] < least);
  }
  keep_where(found, keep);
}

template <typename T>
std::vector<Row<T>> prune(const Tensor& x, const Criteria& criteria) {
  using Acc = Accumulator<T>;
  const int64_t columns = x.size(1), places = capacity<T>(criteria, columns);
  std::vector<Row<T>> rows(x.size(0));
  torch::stable::parallel_for(0, x.size(0), 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t kSlack = Candidates<Acc>::kSlack;
    const Scratch<Acc> value(places + kSlack);
    const Scratch<int32_t> column(places + kSlack);
    const Scratch<Position<Acc>> key(places + kSlack);
    Candidates<Acc> found{value.get(), column.get(), key.get(), places, 0};
    for (int64_t b = begin; b < end; ++b) {
      const T* source = const_data<T>(x) + b * x.stride(0);
      collect_row<T>(source, columns, criteria, found);
      if (criteria.max_ratio || criteria.mass) apply<T>(criteria, found);
      Row<T>& row = rows[b];
      row.columns.assign(found.column, found.column + found.count);
      row.values.reserve(found.count);
      for (const int32_t kept : row.columns) row.values.push_back(source[kept]);
    }
  });
  return rows;
}

// Padded rows, as wide as the longest.
template <typename T>
void write_rows(const std::vector<Row<T>>& rows, const Tensor& indices, const Tensor& values, const Tensor& lengths) {
  const int64_t width = indices.size(1);
  // Little is copied by one thread: waking the others takes longer.
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (width + 1));
  torch::stable::parallel_for(0, static_cast<int64_t>(rows.size()), grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Row<T>& row = rows[b];
      const int64_t length = static_cast<int64_t>(row.columns.size());
      int32_t* index = mutable_data<int32_t>(indices) + b * width;
      T* value = mutable_data<T>(values) + b * width;
      std::fill(std::copy(row.columns.begin(), row.columns.end(), index), index + width, -1);
      std::fill(std::copy(row.values.begin(), row.values.end(), value), value + width, T{});
      mutable_data<int32_t>(lengths)[b] = static_cast<int32_t>(length);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> prune_rows(const Tensor& x, std::optional<int64_t> k,
                                              std::optional<double> threshold, std::optional<double> max_ratio,
                                              std::optional<double> mass) {
  const Criteria criteria = check_criteria(x, k, threshold, max_ratio, mass);
  const int64_t batch = x.size(0), columns = x.size(1);
  const Tensor dense = with_whole_rows(x);
  std::optional<std::tuple<Tensor, Tensor, Tensor>> outputs;
  dispatch_floating(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const std::vector<Row<T>> rows = prune<T>(dense, criteria);
    int64_t width = criteria.every_row_is_full() ? criteria.width(columns) : 0;
    for (const Row<T>& row : rows) width = std::max(width, static_cast<int64_t>(row.columns.size()));
    const std::vector<int64_t> shape{batch, width};
    outputs = {torch::stable::new_empty(x, shape), torch::stable::new_empty(x, shape, ScalarType::Int),
               torch::stable::new_empty(x, std::vector<int64_t>{batch}, ScalarType::Int)};
    write_rows(rows, std::get<1>(*outputs), std::get<0>(*outputs), std::get<2>(*outputs));
  });
  return *outputs;
}

}  // namespace
}  // namespace splade_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CPU, m) { m.impl("prune_rows", TORCH_BOX(&splade_fast::cpu::prune_rows)); }
