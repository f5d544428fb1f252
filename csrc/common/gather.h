// Arguments of the gather ops, with their checks, for both backends: tables of any dtype whose rows run along
// dimension 0.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <ostream>
#include <vector>

#include "common/dispatch.h"

namespace splade_fast {

using Tensors = std::vector<Tensor>;

inline int64_t row_bytes(const Tensor& table) {
  int64_t bytes = static_cast<int64_t>(table.element_size());
  for (int64_t dim = 1; dim < table.dim(); ++dim) bytes *= table.size(dim);
  return bytes;
}

inline int64_t row_stride_bytes(const Tensor& table) {
  return table.stride(0) * static_cast<int64_t>(table.element_size());
}

// Whether each row is contiguous; rows may be any stride apart.
inline bool has_contiguous_rows(const Tensor& table) {
  if (row_bytes(table) == 0) return true;
  int64_t expected = 1;
  for (int64_t dim = table.dim() - 1; dim > 0; --dim) {
    if (table.size(dim) != 1 && table.stride(dim) != expected) return false;
    expected *= table.size(dim);
  }
  return true;
}

// Addresses [first, last) of the bytes of a table.
struct ByteSpan {
  uintptr_t first, last;
};

inline ByteSpan byte_span(const Tensor& table) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(table.const_data_ptr());
  if (table.numel() == 0) return {first, first};
  return {first, first + static_cast<uintptr_t>((table.size(0) - 1) * row_stride_bytes(table) + row_bytes(table))};
}

inline std::vector<ByteSpan> byte_spans(const Tensors& tables) {
  std::vector<ByteSpan> spans;
  spans.reserve(tables.size());
  for (const Tensor& table : tables) spans.push_back(byte_span(table));
  return spans;
}

inline bool has_overlap(const ByteSpan& a, const ByteSpan& b) { return a.first < b.last && b.first < a.last; }

// Return the number of rows of the tables.
inline int64_t check_tables(const Tensors& tables, const Tensor& indices) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.dim() == 1,
                  "indices must be int64 (count,), got ", describe(indices));
  for (size_t t = 0; t < tables.size(); ++t) {
    STD_TORCH_CHECK(tables[t].dim() >= 1, "tables[", t, "] must have at least one dimension, got a scalar");
    STD_TORCH_CHECK(tables[t].size(0) == tables[0].size(0), "tables[", t, "] must have as many rows as tables[0], ",
                    tables[0].size(0), ", got ", tables[t].size(0));
  }
  return tables.empty() ? 0 : tables[0].size(0);
}

// Name of a tensor of a list, such as rows[0]. The name is put together only for an error message.
struct Element {
  const char* list;
  size_t index;
  friend std::ostream& operator<<(std::ostream& out, const Element& element) {
    return out << element.list << '[' << element.index << ']';
  }
};

// Check that rows[i], for 0 <= i < count, can replace a row of the table.
inline void check_rows_fit(const Element& name, const Tensor& rows, const Tensor& table, int64_t count) {
  STD_TORCH_CHECK(rows.scalar_type() == table.scalar_type(), name, " must have the dtype of its table, ",
                  torch::headeronly::toString(table.scalar_type()), ", got ",
                  torch::headeronly::toString(rows.scalar_type()));
  bool has_row_shape = rows.dim() == table.dim() && rows.size(0) == count;
  for (int64_t dim = 1; has_row_shape && dim < table.dim(); ++dim) has_row_shape = rows.size(dim) == table.size(dim);
  STD_TORCH_CHECK(has_row_shape, name, " must be (count, *row) with count = ", count,
                  " and the row shape of its table, got ", describe(rows));
}

// Check that one call can write to rows of all these tables.
inline void check_writable(const Tensors& tables) {
  const std::vector<ByteSpan> spans = byte_spans(tables);
  for (size_t t = 0; t < tables.size(); ++t) {
    const Tensor& table = tables[t];
    STD_TORCH_CHECK(has_contiguous_rows(table), "tables[", t, "] must have contiguous rows to be written to");
    STD_TORCH_CHECK(table.size(0) < 2 || row_stride_bytes(table) >= row_bytes(table), "tables[", t,
                    "] must have rows that do not overlap");
    for (size_t other = 0; other < t; ++other) {
      STD_TORCH_CHECK(!has_overlap(spans[t], spans[other]), "tables[", t, "] must not share memory with tables[", other,
                      "]");
    }
  }
}

inline void check_row_mask(const char* name, const std::optional<Tensor>& mask, int64_t count) {
  if (!mask) return;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 1 && mask->size(0) == count, name,
                  " must be bool (count,) = (", count, ",), got ", describe(*mask));
}

template <typename Name>
void check_on(const Name& name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  STD_TORCH_CHECK(tensor.device() == other.device(), name, " must be on the device of ", other_name);
}

inline int64_t check_scatter(const Tensors& tables, const Tensor& indices, const Tensors& rows,
                             const std::optional<Tensor>& mask) {
  const int64_t table_rows = check_tables(tables, indices), count = indices.size(0);
  STD_TORCH_CHECK(rows.size() == tables.size(), "rows must have one tensor for each of the ", tables.size(),
                  " tables, got ", rows.size());
  for (size_t t = 0; t < tables.size(); ++t) {
    const Element name{"rows", t};
    check_rows_fit(name, rows[t], tables[t], count);
    check_on(name, rows[t], "indices", indices);
  }
  check_writable(tables);
  check_row_mask("mask", mask, count);
  if (mask) check_on("mask", *mask, "indices", indices);
  return table_rows;
}

// Arguments of update_cache_.
struct CacheUpdate {
  const Tensors& tables;
  const Tensor& age;
  const Tensor& valid;
  const Tensors& new_rows;  // one tensor for each table, or none
  const std::optional<Tensor>& new_mask;
  const Tensors& refreshed_rows;  // one tensor for each of the first tables
  const std::optional<Tensor>& refreshed_slots;
  const std::optional<Tensor>& refreshed_mask;

  int64_t slots() const { return age.size(0); }
  int64_t new_count() const { return new_rows.empty() ? 0 : new_rows[0].size(0); }
  int64_t refreshed_count() const { return refreshed_slots ? refreshed_slots->size(0) : 0; }
  Tensors written() const {
    Tensors all = tables;
    all.push_back(age);
    all.push_back(valid);
    return all;
  }
};

inline void check_cache_update(const CacheUpdate& update) {
  const Tensor &age = update.age, &valid = update.valid;
  const int64_t slots = age.numel(), added = update.new_count(), refreshed = update.refreshed_count();
  STD_TORCH_CHECK(age.scalar_type() == ScalarType::Int && age.dim() == 1 && age.is_contiguous(),
                  "age must be contiguous int32 (slots,), got ", describe(age));
  STD_TORCH_CHECK(
      valid.scalar_type() == ScalarType::Bool && valid.dim() == 1 && valid.size(0) == slots && valid.is_contiguous(),
      "valid must be contiguous bool (slots,) = (", slots, ",), got ", describe(valid));
  check_on("valid", valid, "age", age);
  for (size_t t = 0; t < update.tables.size(); ++t) {
    const Tensor& table = update.tables[t];
    STD_TORCH_CHECK(table.dim() >= 1 && table.size(0) == slots, "tables[", t, "] must have a row for each of the ",
                    slots, " slots");
  }
  check_writable(update.written());
  STD_TORCH_CHECK(update.new_rows.empty() || update.new_rows.size() == update.tables.size(),
                  "new_rows must be none or one tensor for each of the ", update.tables.size(), " tables, got ",
                  update.new_rows.size());
  STD_TORCH_CHECK(update.refreshed_rows.size() <= update.tables.size(), "refreshed_rows must be at most the ",
                  update.tables.size(), " tables, got ", update.refreshed_rows.size());
  STD_TORCH_CHECK(update.refreshed_slots || update.refreshed_rows.empty(),
                  "refreshed_slots must be given with refreshed_rows, got None");
  if (update.refreshed_slots) check_tables({}, *update.refreshed_slots);
  const auto check_rows = [&](const char* name, const Tensors& rows, int64_t count) {
    for (size_t t = 0; t < rows.size(); ++t) {
      const Element element{name, t};
      check_rows_fit(element, rows[t], update.tables[t], count);
      check_on(element, rows[t], "age", age);
    }
  };
  // With a mask, new_rows may have more rows: only those whose mask is true are new items. Counting them here would
  // make the host wait for a GPU.
  STD_TORCH_CHECK(update.new_mask || added <= slots, "new_rows must be at most the ", slots, " slots, got ", added);
  check_rows("new_rows", update.new_rows, added);
  check_rows("refreshed_rows", update.refreshed_rows, refreshed);
  check_row_mask("new_mask", update.new_mask, added);
  check_row_mask("refreshed_mask", update.refreshed_mask, refreshed);
  if (update.refreshed_slots) check_on("refreshed_slots", *update.refreshed_slots, "age", age);
  if (update.new_mask) check_on("new_mask", *update.new_mask, "age", age);
  if (update.refreshed_mask) check_on("refreshed_mask", *update.refreshed_mask, "age", age);
}

// Contiguous rows that will be written to the tables. Rows that share memory with a table are copied.
inline Tensors contiguous_sources(const Tensors& rows, const Tensors& tables) {
  const std::vector<ByteSpan> written = byte_spans(tables);
  Tensors sources;
  sources.reserve(rows.size());
  for (const Tensor& row : rows) {
    Tensor source = as_contiguous(row);
    const ByteSpan span = byte_span(source);
    const bool is_shared =
        std::any_of(written.begin(), written.end(), [&](const ByteSpan& table) { return has_overlap(span, table); });
    sources.push_back(is_shared ? torch::stable::clone(source) : source);
  }
  return sources;
}

}  // namespace splade_fast
