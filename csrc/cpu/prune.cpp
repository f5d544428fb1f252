// prune on the CPU: dense rows (B, V) -> the entries to keep, and back.
//
// One pass over a row collects what may be kept. With k the buffer holds only about 2 k entries: whenever it is
// full the k largest stay, and the smallest of them is the threshold of what follows, because a later equal entry would
// lose the tie. So dense rows cost about one read as well, and every row fits. Where there are fewer rows than threads,
// rows are cut into parts; what one part keeps are candidates of the row.
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

template <typename T>
Accumulator<T> rounded(Accumulator<T> value) {
  T stored;
  kernels<T>().store(&stored, &value, 1);
  kernels<T>().load(&value, &stored, 1);
  return value;
}

bool largest_only(const Criteria& criteria) { return criteria.k && !criteria.mass; }

// How many candidates there may be at once.
template <typename T>
int64_t capacity(const Criteria& criteria, int64_t columns) {
  constexpr int64_t kSlack = Candidates<Accumulator<T>>::kSlack, kEnough = 512;
  const int64_t all = columns + kSlack;
  // The sum that mass refers to is that of all candidates.
  return largest_only(criteria) ? std::min(all, std::max(2 * *criteria.k, kEnough) + kSlack) : all;
}

// The candidates of one thread and their memory.
template <typename Acc>
struct Buffer {
  static constexpr int64_t kSlack = Candidates<Acc>::kSlack;

  explicit Buffer(int64_t capacity)
      : value(capacity + kSlack),
        column(capacity + kSlack),
        key(capacity + kSlack),
        found{value.get(), column.get(), key.get(), capacity, 0} {}

  const Scratch<Acc> value;
  const Scratch<int32_t> column;
  const Scratch<Position<Acc>> key;
  Candidates<Acc> found;
};

// The columns [first, last) of a row: the entries that are not <= threshold, or the k largest of them.
template <typename T>
void collect_part(const T* row, int64_t first, int64_t last, const Criteria& criteria,
                  Candidates<Accumulator<T>>& found) {
  using Acc = Accumulator<T>;
  const Kernels<T>& kernel = kernels<T>();
  // No threshold: NaN, which nothing is at most.
  Acc threshold = std::numeric_limits<Acc>::quiet_NaN();
  if (criteria.threshold) threshold = rounded<T>(static_cast<Acc>(*criteria.threshold));
  found.count = 0;
  if (largest_only(criteria) && *criteria.k == 0) return;
  for (int64_t column = kernel.collect(row, first, last, threshold, found);;
       column = kernel.collect(row, column, last, threshold, found)) {
    if (largest_only(criteria) && found.count > *criteria.k) {
      threshold = kernel.keep_largest(found, *criteria.k);
      if (threshold != threshold) return;  // k times NaN
    }
    if (column == last) return;
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

// The criteria that need all candidates of a row. Every comparison is false for NaN, which keeps the entry.
template <typename T>
void apply(const Criteria& criteria, Candidates<Accumulator<T>>& found) {
  using Acc = Accumulator<T>;
  if (!criteria.max_ratio && !criteria.mass) return;
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

// Into how many parts to cut each row, so that every thread has some. Waking a thread takes as long as a small part.
int64_t parts_of_a_row(int64_t batch, int64_t columns) {
  constexpr int64_t kLeast = 1 << 18;
  const int64_t threads = torch::stable::get_num_threads();
  return batch == 0 ? 1 : std::max<int64_t>(1, std::min((threads + batch - 1) / batch, columns / kLeast));
}

template <typename T>
Row<T> taken_from(const T* source, const Candidates<Accumulator<T>>& found) {
  Row<T> row{{found.column, found.column + found.count}, {}};
  row.values.reserve(found.count);
  for (const int32_t kept : row.columns) row.values.push_back(source[kept]);
  return row;
}

// What the parts of a row keep, in the order of the columns, is all that the whole row may keep.
template <typename T>
Row<T> join(const T* source, const Row<T>* parts, int64_t count, const Criteria& criteria) {
  int64_t candidates = 0;
  for (int64_t part = 0; part < count; ++part) candidates += static_cast<int64_t>(parts[part].columns.size());
  Buffer<Accumulator<T>> buffer(candidates);
  auto& found = buffer.found;
  for (int64_t part = 0; part < count; ++part) {
    const auto& [columns, values] = parts[part];
    std::copy(columns.begin(), columns.end(), found.column + found.count);
    kernels<T>().load(found.value + found.count, values.data(), static_cast<int64_t>(values.size()));
    found.count += static_cast<int64_t>(columns.size());
  }
  if (largest_only(criteria) && found.count > *criteria.k) kernels<T>().keep_largest(found, *criteria.k);
  apply<T>(criteria, found);
  return taken_from(source, found);
}

template <typename T>
std::vector<Row<T>> prune(const Tensor& x, const Criteria& criteria) {
  const int64_t batch = x.size(0), columns = x.size(1), parts = parts_of_a_row(batch, columns);
  const int64_t places = capacity<T>(criteria, (columns + parts - 1) / parts);
  const auto row = [&](int64_t b) { return const_data<T>(x) + b * row_stride(x); };
  std::vector<Row<T>> found(batch * parts);
  torch::stable::parallel_for(0, batch * parts, 1, [&](int64_t begin, int64_t end) {
    Buffer<Accumulator<T>> buffer(places);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / parts, part = i % parts;
      collect_part(row(b), columns * part / parts, columns * (part + 1) / parts, criteria, buffer.found);
      if (parts == 1) apply<T>(criteria, buffer.found);
      found[i] = taken_from(row(b), buffer.found);
    }
  });
  if (parts == 1) return found;
  std::vector<Row<T>> rows(batch);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) rows[b] = join(row(b), &found[b * parts], parts, criteria);
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
    write_rows(rows, std::get<1>(*outputs), std::get<0>(*outputs), std::get<2>(*outputs));
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

// A part is written while it is in the cache: zeros, then the entries that it has.
template <typename T>
void write_dense(const int32_t* indices, const T* values, const int32_t* lengths, int64_t width, const Tensor& dense) {
  const int64_t batch = dense.size(0), columns = dense.size(1), parts = parts_of_a_row(batch, columns);
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
    write_dense(const_data<int32_t>(columns), const_data<T>(entries), const_data<int32_t>(sizes), width, dense);
  });
  return dense;
}

}  // namespace
}  // namespace splade_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CPU, m) {
  m.impl("prune_rows", TORCH_BOX(&splade_fast::cpu::prune_rows));
  m.impl("dense_rows", TORCH_BOX(&splade_fast::cpu::dense_rows));
}
