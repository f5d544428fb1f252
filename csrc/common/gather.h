// What gather reads and writes, checked for both backends: tables of any dtype whose rows run along dimension 0.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

#include "checks.h"

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

// Rows may be apart, but each has to be in one piece.
inline bool has_whole_rows(const Tensor& table) {
  if (row_bytes(table) == 0) return true;
  int64_t expected = 1;
  for (int64_t dim = table.dim() - 1; dim > 0; --dim) {
    if (table.size(dim) != 1 && table.stride(dim) != expected) return false;
    expected *= table.size(dim);
  }
  return true;
}

struct Span {
  uintptr_t first, last;
};

inline Span span_of(const Tensor& table) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(table.const_data_ptr());
  if (table.numel() == 0) return {first, first};
  return {first, first + static_cast<uintptr_t>((table.size(0) - 1) * row_stride_bytes(table) + row_bytes(table))};
}

inline bool overlap(const Tensor& a, const Tensor& b) {
  const Span one = span_of(a), other = span_of(b);
  return one.first < other.last && other.first < one.last;
}

// The tables' number of rows.
inline int64_t check_tables(const Tensors& tables, const Tensor& indices) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.dim() == 1, "indices must be int64 (count,)");
  for (size_t t = 0; t < tables.size(); ++t) {
    STD_TORCH_CHECK(tables[t].dim() >= 1, "tables[", t, "] must have at least one dimension, got a scalar");
    STD_TORCH_CHECK(tables[t].size(0) == tables[0].size(0), "tables[", t, "] must have as many rows as tables[0], ",
                    tables[0].size(0), ", got ", tables[t].size(0));
  }
  return tables.empty() ? 0 : tables[0].size(0);
}

inline int64_t check_written(const Tensors& tables, const Tensor& indices, const Tensors& rows,
                             const std::optional<Tensor>& mask) {
  const int64_t table_rows = check_tables(tables, indices), count = indices.size(0);
  STD_TORCH_CHECK(rows.size() == tables.size(), "rows must have one tensor for each of the ", tables.size(),
                  " tables, got ", rows.size());
  for (size_t t = 0; t < tables.size(); ++t) {
    const Tensor &table = tables[t], &row = rows[t];
    STD_TORCH_CHECK(row.scalar_type() == table.scalar_type(), "rows[", t, "] must have the dtype of its table, ",
                    torch::headeronly::toString(table.scalar_type()), ", got ",
                    torch::headeronly::toString(row.scalar_type()));
    bool fits = row.dim() == table.dim() && row.size(0) == count;
    for (int64_t dim = 1; fits && dim < table.dim(); ++dim) fits = row.size(dim) == table.size(dim);
    STD_TORCH_CHECK(fits, "rows[", t, "] must be (count, *row) with count = ", count,
                    " and the row shape of its table");
    STD_TORCH_CHECK(row.device() == indices.device(), "rows[", t, "] must be on the device of indices");
    STD_TORCH_CHECK(has_whole_rows(table), "tables[", t, "] must have contiguous rows to be written to");
    STD_TORCH_CHECK(table_rows < 2 || row_stride_bytes(table) >= row_bytes(table), "tables[", t,
                    "] must have rows that do not overlap");
    for (size_t other = 0; other < t; ++other) {
      STD_TORCH_CHECK(!overlap(table, tables[other]), "tables[", t, "] must not share memory with tables[", other, "]");
    }
  }
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 1 && mask->size(0) == count,
                    "mask must be bool (count,) = (", count, ",)");
    STD_TORCH_CHECK(mask->device() == indices.device(), "mask must be on the device of indices");
  }
  return table_rows;
}

// Rows to be written, contiguous, and copied first where they lie in a table that is written to.
inline Tensors contiguous_sources(const Tensors& rows, const Tensors& tables) {
  Tensors sources;
  for (const Tensor& row : rows) {
    Tensor source = torch::stable::contiguous(row);
    for (const Tensor& table : tables) {
      if (overlap(source, table)) {
        source = torch::stable::clone(source);
        break;
      }
    }
    sources.push_back(source);
  }
  return sources;
}

}  // namespace splade_fast
