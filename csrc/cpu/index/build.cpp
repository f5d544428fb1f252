// Building of a pruned index: the entries of all rows, sorted by counting. The caller has memory or a file for the
// index between the two readings.
#include <torch/csrc/stable/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "cpu/index/index.h"
#include "cpu/memory.h"

namespace splade_fast::cpu {
namespace {

constexpr int64_t kMaxCols = 1 << 24;  // bounds the memory for the terms
constexpr const char* kOtherRows = "index must have the shapes that index_count returns for the same rows";

template <typename T>
struct Rows {
  const int32_t* indices;
  const T* values;
  const int32_t* lengths;
  int64_t count, width, num_cols;
};

// What the first reading learns of a term.
struct Term {
  int64_t entries = 0, postings = 0;
  int64_t last_group = -1;
  double largest = 0;
};

// Ask for the pages of a row, which the system then reads from a mapped file while other rows are at work. Pages that
// are asked for one after another as they are needed wait for the disk each.
inline void fetch_pages(const void* row, int64_t bytes) {
#if defined(__linux__)
  static const uintptr_t page = sysconf(_SC_PAGESIZE);
  const uintptr_t first = reinterpret_cast<uintptr_t>(row) / page * page;
  madvise(reinterpret_cast<void*>(first), reinterpret_cast<uintptr_t>(row) + bytes - first, MADV_WILLNEED);
#endif
}

template <typename T>
void fetch_rows(const Rows<T>& rows, const int32_t* order, int64_t begin, int64_t end) {
  for (int64_t place = begin; place < std::min(end, rows.count); ++place) {
    const int64_t first = order[place] * rows.width;
    fetch_pages(rows.indices + first, rows.width * sizeof(int32_t));
    fetch_pages(rows.values + first, rows.width * sizeof(T));
  }
}

// Call body(place, column, value) for every entry of every row; place is the row's place in the order.
template <typename T, typename Body>
void for_each_posting(const Rows<T>& rows, const int32_t* order, Body body) {
  fetch_rows(rows, order, 0, kGroupDocuments);
  for (int64_t place = 0; place < rows.count; ++place) {
    if (place % kGroupDocuments == 0) fetch_rows(rows, order, place + kGroupDocuments, place + 2 * kGroupDocuments);
    const int64_t row = order[place], length = rows.lengths[row];
    STD_TORCH_CHECK(length >= 0 && length <= rows.width, kOtherRows);
    const int32_t* const columns = rows.indices + row * rows.width;
    const T* const values = rows.values + row * rows.width;
    for (int64_t j = 0; j < length; ++j) body(place, columns[j], values[j]);
  }
}

template <typename T>
void check_row(const Rows<T>& rows, int64_t row) {
  const int64_t length = rows.lengths[row];
  STD_TORCH_CHECK(length >= 0 && length <= rows.width, "lengths must be between 0 and ", rows.width, ", got ", length,
                  " in row ", row);
  int64_t last = -1;
  for (int64_t j = 0; j < length; ++j) {
    const int64_t column = rows.indices[row * rows.width + j];
    STD_TORCH_CHECK(column > last && column < rows.num_cols, "indices must ascend from 0 to at most ",
                    rows.num_cols - 1, " where used, got ", column, " after ", last, " in row ", row);
    last = column;
    const double value = to_number(rows.values[row * rows.width + j]);
    STD_TORCH_CHECK(value >= 0 && std::isfinite(value), "values must be finite and at least 0, got ", value, " in row ",
                    row);
  }
}

// Return a step with 24 significant bits for which 255 steps reach `largest`. Its products with one byte are exact.
double choose_step(double largest) {
  if (largest == 0) return 0;
  int exponent = 0;
  const double mantissa = std::frexp(largest / 255, &exponent);
  double step = std::ldexp(std::ceil(std::ldexp(mantissa, 24)), exponent - 24);
  while (255 * step < largest) {  // the quotient was rounded down, or is not normal
    step += std::max(std::ldexp(1.0, exponent - 24), std::numeric_limits<double>::denorm_min());
  }
  return step;
}

uint8_t count_steps(double value, double step) {
  int64_t steps = value == 0 ? 0 : std::min<int64_t>(static_cast<int64_t>(value / step), 255);
  while (steps * step < value) ++steps;
  return static_cast<uint8_t>(steps);
}

// Replace the places of an entry by bits, if it has enough of them.
void set_bitmap(uint8_t* documents, int64_t count) {
  if (count < kBitmapBytes) return;
  uint8_t bitmap[kBitmapBytes] = {};
  for (int64_t i = 0; i < count; ++i) bitmap[documents[i] / 8] |= 1 << documents[i] % 8;
  std::fill_n(documents, count, uint8_t{0});
  std::copy_n(bitmap, kBitmapBytes, documents);
}

// Number of entries and postings of all terms, and the steps of their maxima.
struct Counts {
  Tensor term_start, posting_start, step;
};

template <typename T>
Counts count(const Rows<T>& rows, const int32_t* order, const Tensor& like) {
  for (int64_t row = 0; row < rows.count; ++row) check_row(rows, row);
  std::vector<Term> terms(rows.num_cols);
  for_each_posting(rows, order, [&](int64_t place, int32_t column, T value) {
    Term& term = terms[column];
    const int64_t group = place / kGroupDocuments;
    term.entries += group != term.last_group;
    term.last_group = group;
    ++term.postings;
    term.largest = std::max<double>(term.largest, to_number(value));
  });

  const Counts counts{new_tensor(like, {rows.num_cols + 1}, ScalarType::Long),
                      new_tensor(like, {rows.num_cols + 1}, ScalarType::Long),
                      new_tensor(like, {rows.num_cols}, ScalarType::Double)};
  int64_t* const term_starts = mutable_data<int64_t>(counts.term_start);
  int64_t* const posting_starts = mutable_data<int64_t>(counts.posting_start);
  double* const steps = mutable_data<double>(counts.step);
  int64_t entries = 0, postings = 0;
  for (int64_t column = 0; column < rows.num_cols; ++column) {
    term_starts[column] = entries;
    posting_starts[column] = postings;
    steps[column] = choose_step(terms[column].largest);
    entries += terms[column].entries;
    postings += terms[column].postings;
  }
  term_starts[rows.num_cols] = entries;
  posting_starts[rows.num_cols] = postings;
  STD_TORCH_CHECK(entries <= INT32_MAX, "rows must have at most ", INT32_MAX, " pairs of a term and a group, got ",
                  entries);
  return counts;
}

// Tensors of an index that are written.
template <typename T>
struct Target {
  int32_t* group;
  int64_t* start;
  uint8_t* maximum;
  uint8_t* document;
  T* value;
  int32_t* id;
};

// The next entry and the next posting of a term, and where both end.
struct Cursor {
  int64_t entry, last_entry, posting, last_posting;
  int64_t group = -1;
};

// Write every posting, next to the one of the same term before. Each of the arrays is written from front to back for
// each term, and nothing is read that was written long before, so that the target may be a file that is larger than
// memory.
template <typename T>
void fill(const Rows<T>& rows, const int32_t* order, const PrunedIndex<T>& index, const int64_t* posting_starts,
          const Target<T>& target) {
  std::vector<Cursor> cursors(rows.num_cols);
  for (int64_t column = 0; column < rows.num_cols; ++column) {
    cursors[column] = {index.term_start[column], index.term_start[column + 1], posting_starts[column],
                       posting_starts[column + 1]};
    const Cursor& cursor = cursors[column];
    STD_TORCH_CHECK(0 <= cursor.entry && cursor.entry <= cursor.last_entry && cursor.last_entry <= index.entries &&
                        0 <= cursor.posting && cursor.posting <= cursor.last_posting &&
                        cursor.last_posting <= index.postings,
                    kOtherRows);
  }
  const auto finish_entry = [&](const Cursor& cursor) {
    const int64_t start = target.start[cursor.entry - 1];
    set_bitmap(target.document + start, cursor.posting - start);
  };
  for_each_posting(rows, order, [&](int64_t place, int32_t column, T value) {
    STD_TORCH_CHECK(column >= 0 && column < rows.num_cols, kOtherRows);
    Cursor& cursor = cursors[column];
    const int64_t group = place / kGroupDocuments, block = place / kBlockDocuments % kGroupBlocks;
    if (group != cursor.group) {
      if (cursor.group >= 0) finish_entry(cursor);
      STD_TORCH_CHECK(cursor.entry < cursor.last_entry, kOtherRows);
      cursor.group = group;
      target.group[cursor.entry] = static_cast<int32_t>(group);
      target.start[cursor.entry] = cursor.posting;
      std::fill_n(target.maximum + cursor.entry * kGroupBlocks, kGroupBlocks, uint8_t{0});
      ++cursor.entry;
    }
    STD_TORCH_CHECK(cursor.posting < cursor.last_posting, kOtherRows);
    const double number = to_number(value), step = index.step[column];
    STD_TORCH_CHECK(number >= 0 && number <= 255 * step, kOtherRows);
    uint8_t& maximum = target.maximum[(cursor.entry - 1) * kGroupBlocks + block];
    maximum = std::max(maximum, count_steps(number, step));
    target.document[cursor.posting] = static_cast<uint8_t>(place % kGroupDocuments);
    target.value[cursor.posting++] = value;
  });
  for (const Cursor& cursor : cursors) {
    if (cursor.group >= 0) finish_entry(cursor);
    STD_TORCH_CHECK(cursor.entry == cursor.last_entry && cursor.posting == cursor.last_posting, kOtherRows);
  }
  target.start[index.entries] = index.postings;
  std::copy_n(order, rows.count, target.id);
}

// Check rows and their order, and call body(Rows<T>, order).
template <typename Body>
void with_rows(const Tensor& indices, const Tensor& values, const Tensor& lengths, int64_t num_cols,
               const Tensor& order, Body body) {
  check_sparse_rows("", indices, values, lengths, num_cols);
  const int64_t count = values.size(0);
  STD_TORCH_CHECK(num_cols <= kMaxCols, "num_cols must be at most ", kMaxCols, " for an index, got ", num_cols);
  STD_TORCH_CHECK(count < INT32_MAX - kGroupDocuments, "values must have fewer than ", INT32_MAX - kGroupDocuments,
                  " rows, got ", count);
  STD_TORCH_CHECK(order.scalar_type() == ScalarType::Int && order.dim() == 1 && order.size(0) == count,
                  "order must be int32 (", count, ",), got ", describe(order));
  const Tensor columns = as_contiguous(indices), entries = as_contiguous(values), sizes = as_contiguous(lengths);
  const Tensor places = as_contiguous(order);
  const int32_t* const rows_in_order = const_data<int32_t>(places);
  std::vector<bool> is_seen(count);
  for (int64_t place = 0; place < count; ++place) {
    const int64_t row = rows_in_order[place];
    STD_TORCH_CHECK(row >= 0 && row < count && !is_seen[row], "order must name every row once, got ", row, " at ",
                    place);
    is_seen[row] = true;
  }
  dispatch_floating(entries.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    body(Rows<T>{const_data<int32_t>(columns), const_data<T>(entries), const_data<int32_t>(sizes), count,
                 values.size(1), num_cols},
         rows_in_order);
  });
}

std::tuple<Tensor, Tensor, Tensor> index_count(const Tensor& indices, const Tensor& values, const Tensor& lengths,
                                               int64_t num_cols, const Tensor& order) {
  std::optional<Counts> counts;
  with_rows(indices, values, lengths, num_cols, order,
            [&](const auto& rows, const int32_t* rows_in_order) { counts = count(rows, rows_in_order, values); });
  return {counts->term_start, counts->posting_start, counts->step};
}

void index_fill(const Tensor& indices, const Tensor& values, const Tensor& lengths, int64_t num_cols,
                const Tensor& order, const Tensor& posting_start, const std::vector<Tensor>& tensors) {
  with_rows(indices, values, lengths, num_cols, order, [&](const auto& rows, const int32_t* rows_in_order) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(rows.values)>>;
    with_index(tensors, [&](const auto& index) {
      using I = IndexTensors;
      STD_TORCH_CHECK(tensors[I::kValue].scalar_type() == values.scalar_type() && index.num_cols == num_cols &&
                          index.documents == rows.count && posting_start.scalar_type() == ScalarType::Long &&
                          posting_start.dim() == 1 && posting_start.size(0) == num_cols + 1 &&
                          posting_start.is_contiguous() && posting_start.is_cpu(),
                      kOtherRows);
      if constexpr (std::is_same_v<decltype(index.value), const T*>) {
        fill(rows, rows_in_order, index, const_data<int64_t>(posting_start),
             Target<T>{mutable_data<int32_t>(tensors[I::kGroup]), mutable_data<int64_t>(tensors[I::kStart]),
                       mutable_data<uint8_t>(tensors[I::kMaximum]), mutable_data<uint8_t>(tensors[I::kDocument]),
                       mutable_data<T>(tensors[I::kValue]), mutable_data<int32_t>(tensors[I::kId])});
      }
    });
  });
}

}  // namespace
}  // namespace splade_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CPU, m) {
  m.impl("index_count", TORCH_BOX(&splade_fast::cpu::index_count));
  m.impl("index_fill", TORCH_BOX(&splade_fast::cpu::index_fill));
}
