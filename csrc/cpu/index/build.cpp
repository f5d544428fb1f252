// Building of a pruned index: the entries of all rows, sorted by counting. The rows are read twice.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/index/index.h"
#include "cpu/memory.h"

namespace splade_fast::cpu {
namespace {

constexpr int64_t kMaxCols = 1 << 24;  // bounds the memory for the terms

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

// Call body(place, group, column, value) for every entry of every row; place is the row's place in the order.
template <typename T, typename Body>
void for_each_posting(const Rows<T>& rows, const int32_t* order, Body body) {
  for (int64_t place = 0; place < rows.count; ++place) {
    const int64_t row = order[place];
    const int32_t* const columns = rows.indices + row * rows.width;
    const T* const values = rows.values + row * rows.width;
    for (int64_t j = 0; j < rows.lengths[row]; ++j) body(place, columns[j], values[j]);
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

template <typename T>
std::vector<Tensor> build(const Rows<T>& rows, const int32_t* order, const Tensor& values) {
  std::vector<Term> terms(rows.num_cols);
  for (int64_t row = 0; row < rows.count; ++row) check_row(rows, row);
  for_each_posting(rows, order, [&](int64_t place, int32_t column, T value) {
    Term& term = terms[column];
    const int64_t group = place / kGroupDocuments;
    term.entries += group != term.last_group;
    term.last_group = group;
    ++term.postings;
    term.largest = std::max<double>(term.largest, to_number(value));
  });

  const auto make = [&](ScalarType dtype, std::vector<int64_t> shape) {
    return new_zeros_tensor(values, shape, dtype);
  };
  const Tensor term_start = make(ScalarType::Long, {rows.num_cols + 1}),
               step = make(ScalarType::Double, {rows.num_cols});
  int64_t* const term_starts = mutable_data<int64_t>(term_start);
  double* const steps = mutable_data<double>(step);
  // The next posting of each term. Its next entry is term.entries, once that holds the start of the term.
  std::vector<int64_t> next_posting(rows.num_cols);
  int64_t entries = 0, postings = 0;
  for (int64_t column = 0; column < rows.num_cols; ++column) {
    Term& term = terms[column];
    steps[column] = choose_step(term.largest);
    next_posting[column] = postings;
    postings += term.postings;
    term_starts[column] = entries;
    entries += std::exchange(term.entries, entries);
    term.last_group = -1;
  }
  term_starts[rows.num_cols] = entries;
  STD_TORCH_CHECK(entries <= INT32_MAX, "rows must have at most ", INT32_MAX, " pairs of a term and a group, got ",
                  entries);

  const Tensor group = make(ScalarType::Int, {entries}), start = make(ScalarType::Long, {entries + 1});
  const Tensor maximum = make(ScalarType::Byte, {entries, kGroupBlocks});
  const Tensor document = make(ScalarType::Byte, {postings}), value = make(values.scalar_type(), {postings});
  int32_t* const groups = mutable_data<int32_t>(group);
  int64_t* const starts = mutable_data<int64_t>(start);
  starts[entries] = postings;
  uint8_t* const maxima = mutable_data<uint8_t>(maximum);
  std::fill_n(maxima, entries * kGroupBlocks, uint8_t{0});
  uint8_t* const documents = mutable_data<uint8_t>(document);
  T* const weights = mutable_data<T>(value);
  for_each_posting(rows, order, [&](int64_t place, int32_t column, T weight) {
    Term& term = terms[column];
    const int64_t own_group = place / kGroupDocuments, block = place / kBlockDocuments % kGroupBlocks;
    const int64_t posting = next_posting[column]++;
    if (own_group != term.last_group) {
      term.last_group = own_group;
      groups[term.entries] = static_cast<int32_t>(own_group);
      starts[term.entries++] = posting;
    }
    const int64_t cell = (term.entries - 1) * kGroupBlocks + block;
    maxima[cell] = std::max(maxima[cell], count_steps(to_number(weight), steps[column]));
    documents[posting] = static_cast<uint8_t>(place % kGroupDocuments);
    weights[posting] = weight;
  });
  for (int64_t entry = 0; entry < entries; ++entry) {
    set_bitmap(documents + starts[entry], starts[entry + 1] - starts[entry]);
  }
  const Tensor id = make(ScalarType::Int, {rows.count});
  if (rows.count > 0) std::memcpy(id.mutable_data_ptr(), order, rows.count * sizeof(int32_t));
  return {term_start, step, group, start, maximum, document, value, id};
}

std::vector<Tensor> index_build(const Tensor& indices, const Tensor& values, const Tensor& lengths, int64_t num_cols,
                                const Tensor& order) {
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
  std::vector<Tensor> index;
  dispatch_floating(entries.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    index = build(Rows<T>{const_data<int32_t>(columns), const_data<T>(entries), const_data<int32_t>(sizes), count,
                          values.size(1), num_cols},
                  rows_in_order, entries);
  });
  return index;
}

}  // namespace
}  // namespace splade_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CPU, m) { m.impl("index_build", TORCH_BOX(&splade_fast::cpu::index_build)); }
