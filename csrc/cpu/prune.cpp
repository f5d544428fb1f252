// prune on the CPU: dense rows (B, V) to sparse rows, and back.
//
// One pass over a row collects the entries that may be kept. With k the buffer has room for about 2 k entries. When the
// buffer is full, the k largest stay, and the smallest of them becomes the threshold of the rest of the row, because a
// later equal entry would lose the tie. A row that is dense above the threshold thus costs about one read too. Where
// there are fewer rows than threads, rows are cut into parts, and the entries that the parts keep are joined.
#include "common/prune.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/simd/kernels.h"

namespace splade_fast::cpu {
namespace {

template <typename T>
struct Row {
  std::vector<int32_t> columns;
  std::vector<T> values;
};

// Round a value to T.
template <typename T>
Accumulator<T> round_to(Accumulator<T> value) {
  T stored;
  kernels<T>().store(&stored, &value, 1);
  kernels<T>().load(&value, &stored, 1);
  return value;
}

// Whether only the k largest entries need to be kept while a row is read. mass needs the sum of all entries.
bool has_bounded_buffer(const Criteria& criteria) { return criteria.k && !criteria.mass; }

// Largest number of entries that are kept while a row is read.
template <typename T>
int64_t capacity(const Criteria& criteria, int64_t columns) {
  constexpr int64_t kSlack = RowEntries<Accumulator<T>>::kSlack, kEnough = 512;
  const int64_t all = columns + kSlack;
  return has_bounded_buffer(criteria) ? std::min(all, std::max(2 * *criteria.k, kEnough) + kSlack) : all;
}

// Entries collected by one thread, and their memory.
template <typename Acc>
struct Buffer {
  static constexpr int64_t kSlack = RowEntries<Acc>::kSlack;

  explicit Buffer(int64_t capacity)
      : value(capacity + kSlack),
        column(capacity + kSlack),
        key(capacity + kSlack),
        found{value.get(), column.get(), key.get(), capacity, 0} {}

  const Scratch<Acc> value;
  const Scratch<int32_t> column;
  const Scratch<SortKey<Acc>> key;
  RowEntries<Acc> found;
};

// Collect from columns [first, last) of a row the entries that are not <= threshold, or the k largest of these.
template <typename T>
void collect_part(const T* row, int64_t first, int64_t last, const Criteria& criteria,
                  RowEntries<Accumulator<T>>& found) {
  using Acc = Accumulator<T>;
  const Kernels<T>& kernel = kernels<T>();
  // Without a threshold every entry is collected, because no entry is <= NaN.
  Acc threshold = std::numeric_limits<Acc>::quiet_NaN();
  if (criteria.threshold) threshold = round_to<T>(static_cast<Acc>(*criteria.threshold));
  found.count = 0;
  if (has_bounded_buffer(criteria) && *criteria.k == 0) return;
  for (int64_t column = kernel.collect(row, first, last, threshold, found);;
       column = kernel.collect(row, column, last, threshold, found)) {
    if (has_bounded_buffer(criteria) && found.count > *criteria.k) {
      threshold = kernel.keep_largest(found, *criteria.k);
      if (threshold != threshold) return;  // the k largest are NaN, and no entry can replace them
    }
    if (column == last) return;
  }
}

template <typename Acc>
void keep_where(RowEntries<Acc>& found, const std::vector<char>& keep) {
  int64_t kept = 0;
  for (int64_t i = 0; i < found.count; ++i) {
    found.value[kept] = found.value[i];
    found.column[kept] = found.column[i];
    kept += keep[i];
  }
  found.count = kept;
}

// Order of the entries from the largest on. NaN comes first; equal values stay in the order of their columns.
template <typename Acc>
std::vector<int32_t> rank_entries(const RowEntries<Acc>& found) {
  std::vector<int32_t> order(found.count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const Acc x = found.value[a], y = found.value[b];
    return x > y || (x != x && y == y);
  });
  return order;
}

// Apply max_ratio and mass, which need all collected entries of a row. The comparisons are false for NaN, so NaN is
// kept.
template <typename T>
void apply_row_criteria(const Criteria& criteria, RowEntries<Accumulator<T>>& found) {
  using Acc = Accumulator<T>;
  if (!criteria.max_ratio && !criteria.mass) return;
  std::vector<char> keep(found.count, 1);
  if (criteria.mass) {
    const std::vector<int32_t> order = rank_entries(found);
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
    const Acc least = round_to<T>(largest * static_cast<Acc>(*criteria.max_ratio));
    for (int64_t i = 0; i < found.count; ++i) keep[i] = keep[i] && !(found.value[i] < least);
  }
  keep_where(found, keep);
}

// Number of parts of each row, so that every thread has work. A part smaller than kMinColumns takes less time than
// waking a thread does.
int64_t choose_row_parts(int64_t batch, int64_t columns) {
  constexpr int64_t kMinColumns = 1 << 18;
  const int64_t threads = torch::stable::get_num_threads();
  return batch == 0 ? 1 : std::max<int64_t>(1, std::min(ceil_div(threads, batch), columns / kMinColumns));
}

template <typename T>
Row<T> copy_entries(const T* source, const RowEntries<Accumulator<T>>& found) {
  Row<T> row{{found.column, found.column + found.count}, {}};
  row.values.reserve(found.count);
  for (const int32_t kept : row.columns) row.values.push_back(source[kept]);
  return row;
}

// Join the parts of a row, which are in the order of the columns, and apply the criteria to the whole row.
template <typename T>
Row<T> join_parts(const T* source, const Row<T>* parts, int64_t count, const Criteria& criteria) {
  int64_t entries = 0;
  for (int64_t part = 0; part < count; ++part) entries += static_cast<int64_t>(parts[part].columns.size());
  Buffer<Accumulator<T>> buffer(entries);
  auto& found = buffer.found;
  for (int64_t part = 0; part < count; ++part) {
    const auto& [columns, values] = parts[part];
    std::copy(columns.begin(), columns.end(), found.column + found.count);
    kernels<T>().load(found.value + found.count, values.data(), static_cast<int64_t>(values.size()));
    found.count += static_cast<int64_t>(columns.size());
  }
  if (has_bounded_buffer(criteria) && found.count > *criteria.k) kernels<T>().keep_largest(found, *criteria.k);
  apply_row_criteria<T>(criteria, found);
  return copy_entries(source, found);
}

template <typename T>
std::vector<Row<T>> prune(const Tensor& x, const Criteria& criteria) {
  const int64_t batch = x.size(0), columns = x.size(1), parts = choose_row_parts(batch, columns);
  const int64_t places = capacity<T>(criteria, ceil_div(columns, parts));
  const auto row = [&](int64_t b) { return const_data<T>(x) + b * row_stride(x); };
  std::vector<Row<T>> found(batch * parts);
  torch::stable::parallel_for(0, batch * parts, 1, [&](int64_t begin, int64_t end) {
    Buffer<Accumulator<T>> buffer(places);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / parts, part = i % parts;
      collect_part(row(b), columns * part / parts, columns * (part + 1) / parts, criteria, buffer.found);
      if (parts == 1) apply_row_criteria<T>(criteria, buffer.found);
      found[i] = copy_entries(row(b), buffer.found);
    }
  });
  if (parts == 1) return found;
  std::vector<Row<T>> rows(batch);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) rows[b] = join_parts(row(b), &found[b * parts], parts, criteria);
  });
  return rows;
}

template <typename T>
void write_padded_rows(const std::vector<Row<T>>& rows, const Tensor& indices, const Tensor& values,
                       const Tensor& lengths) {
  const int64_t width = indices.size(1);
  // One thread writes few entries alone, because waking others would take longer.
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
  const Tensor dense = contiguous_rows(x);
  std::optional<std::tuple<Tensor, Tensor, Tensor>> outputs;
  dispatch_floating(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const std::vector<Row<T>> rows = prune<T>(dense, criteria);
    int64_t width = criteria.has_full_rows() ? criteria.width(columns) : 0;
    for (const Row<T>& row : rows) width = std::max(width, static_cast<int64_t>(row.columns.size()));
    const std::vector<int64_t> shape{batch, width};
    outputs = {new_tensor(x, shape), new_tensor(x, shape, ScalarType::Int),
               new_tensor(x, std::vector<int64_t>{batch}, ScalarType::Int)};
    write_padded_rows(rows, std::get<1>(*outputs), std::get<0>(*outputs), std::get<2>(*outputs));
  });
  return *outputs;
}

// Back to dense rows ----------------------------------------------------------------------------------------------

void check_entries(const int32_t* indices, const int32_t* lengths, int64_t batch, int64_t width, int64_t num_cols) {
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(lengths[b] >= 0 && lengths[b] <= width, "lengths must be between 0 and ", width, ", got ",
                    lengths[b], " in row ", b);
    for (int64_t j = 0; j < lengths[b]; ++j) {
      const int64_t column = indices[b * width + j];
      STD_TORCH_CHECK(column >= 0 && column < num_cols, "indices must be between 0 and ", num_cols - 1,
                      " where used, got ", column, " in row ", b);
    }
  }
}

// Write each part of a row as zeros and then its entries, while the part is in the cache.
template <typename T>
void write_dense_rows(const int32_t* indices, const T* values, const int32_t* lengths, int64_t width,
                      const Tensor& dense) {
  const int64_t batch = dense.size(0), columns = dense.size(1), parts = choose_row_parts(batch, columns);
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (columns + 1));
  torch::stable::parallel_for(0, batch * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / parts, part = i % parts;
      const int64_t first = columns * part / parts, last = columns * (part + 1) / parts;
      T* row = mutable_data<T>(dense) + b * columns;
      std::fill(row + first, row + last, T{});
      for (int64_t j = b * width; j < b * width + lengths[b]; ++j) {
        if (indices[j] >= first && indices[j] < last) row[indices[j]] = values[j];
      }
    }
  });
}

Tensor dense_rows(const Tensor& values, const Tensor& indices, const Tensor& lengths, int64_t num_cols) {
  check_sparse_rows("", indices, values, lengths, num_cols);
  const Tensor entries = as_contiguous(values), columns = as_contiguous(indices), sizes = as_contiguous(lengths);
  const int64_t batch = values.size(0), width = values.size(1);
  check_entries(const_data<int32_t>(columns), const_data<int32_t>(sizes), batch, width, num_cols);
  const Tensor dense = new_tensor(values, std::vector<int64_t>{batch, num_cols});
  prefer_huge_pages(dense);
  dispatch_floating(values.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    write_dense_rows(const_data<int32_t>(columns), const_data<T>(entries), const_data<int32_t>(sizes), width, dense);
  });
  return dense;
}

}  // namespace
}  // namespace splade_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CPU, m) {
  m.impl("prune_rows", TORCH_BOX(&splade_fast::cpu::prune_rows));
  m.impl("dense_rows", TORCH_BOX(&splade_fast::cpu::dense_rows));
}
