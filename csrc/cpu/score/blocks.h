// Blocks of sparse queries and tiles of sparse documents, as the score and sample kernels take them.
//
// The terms of a block of kBlockQueries queries make up a compact table. All documents are then read once, in tiles
// whose scores stay in the first-level cache; see score_impl.h.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/simd/kernels.h"

namespace splade_fast::cpu {

constexpr int64_t kBlockQueries = 64;
constexpr int64_t kTileDocuments = 32;  // the scores of a tile and a block of queries take 8 KiB in float

struct SparseQueries {
  const int32_t* indices;  // nullptr for dense queries
  const int32_t* lengths;
  int64_t count, width;
};

// Queries [first, first + count) as a table, which has a row for each column that any of them uses.
template <typename Acc>
class QueryBlock {
 public:
  template <typename T>
  QueryBlock(const SparseQueries& queries, const T* values, int64_t first, int64_t block_queries, int64_t num_cols)
      : first_(first), count_(block_queries), lanes_(round_up(block_queries, kMaxLanes)), rows_(num_cols + 1) {
    const Scratch<Accumulator<T>> row(queries.width);
    // The first pass over the entries finds the columns in use, the second their values.
    for_each_entry(queries, values, row.get(), num_cols, [&](int64_t, int64_t column, Acc) { rows_[column] = 1; });
    int32_t used = 0;
    for (int32_t& target : rows_) target = target ? ++used : 0;
    table_.assign((used + 1) * lanes_, Acc(0));
    for_each_entry(queries, values, row.get(), num_cols,
                   [&](int64_t q, int64_t column, Acc value) { table_[rows_[column] * lanes_ + q] += value; });
  }

  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  int64_t lanes() const { return lanes_; }
  const int32_t* rows() const { return rows_.data(); }
  const Acc* table() const { return table_.data(); }

 private:
  // Zeros of dense queries are skipped.
  template <typename T, typename Body>
  void for_each_entry(const SparseQueries& queries, const T* values, Accumulator<T>* row, int64_t num_cols, Body body) {
    for (int64_t q = 0; q < count_; ++q) {
      const int64_t start = (first_ + q) * queries.width;
      const int64_t length = queries.lengths ? queries.lengths[first_ + q] : queries.width;
      STD_TORCH_CHECK(length >= 0 && length <= queries.width, "query_lengths must be between 0 and ", queries.width,
                      ", got ", length, " in row ", first_ + q);
      kernels<T>().load(row, values + start, length);
      for (int64_t j = 0; j < length; ++j) {
        const int64_t column = queries.indices ? queries.indices[start + j] : j;
        STD_TORCH_CHECK(column >= 0 && column < num_cols, "query_indices must be between 0 and ", num_cols - 1,
                        " where used, got ", column, " in row ", first_ + q);
        if (queries.indices || row[j] != 0) body(q, column, static_cast<Acc>(row[j]));
      }
    }
  }

  int64_t first_, count_, lanes_;
  std::vector<int32_t> rows_;
  std::vector<Acc> table_;
};

template <typename T>
struct Documents {
  const int32_t* indices;
  const T* values;
  const int32_t* lengths;
  int64_t count, width, num_cols;
};

// Scores of a tile of documents, with the scratch memory of the kernel, for one thread.
template <typename T>
class DocumentTile {
 public:
  using Acc = Accumulator<T>;

  DocumentTile(const QueryBlock<Acc>& block, const Documents<T>& documents)
      : hit_rows_(documents.width + kMaxLanes),
        hit_values_(documents.width + kMaxLanes),
        scores_(kTileDocuments * block.lanes()),
        task_{block.rows(),      block.table(),     documents.num_cols, block.lanes(),
              documents.indices, documents.values,  documents.lengths,  documents.width,
              hit_rows_.get(),   hit_values_.get(), scores_.get()} {}

  // Return the scores (end - begin, lanes) of documents [begin, end). If a document has an invalid length or column,
  // store its number in `bad` and return nullptr.
  Acc* score(int64_t begin, int64_t end, std::atomic<int64_t>& bad) {
    const int64_t done = kernels<T>().score_rows(task_, begin, end);
    if (done == end) return scores_.get();
    bad = done;
    return nullptr;
  }

 private:
  const Scratch<int32_t> hit_rows_;
  const Scratch<Acc> hit_values_, scores_;
  const ScoreTask<T> task_;
};

template <typename T>
void report_bad_document(const Documents<T>& documents, int64_t row) {
  if (row < 0) return;
  const int64_t length = documents.lengths[row];
  STD_TORCH_CHECK(length >= 0 && length <= documents.width, "doc_lengths must be between 0 and ", documents.width,
                  ", got ", length, " in row ", row);
  STD_TORCH_CHECK(false, "doc_indices must be between 0 and ", documents.num_cols - 1, " where used, but not in row ",
                  row);
}

// Call body(block, documents, Type<Result>{}) for every block of queries.
template <typename Body>
void for_each_block(const std::optional<Tensor>& query_indices, const Tensor& query_values,
                    const std::optional<Tensor>& query_lengths, const Tensor& doc_indices, const Tensor& doc_values,
                    const Tensor& doc_lengths, int64_t num_cols, ScalarType result, Body body) {
  const std::optional<Tensor> query_columns = contiguous_or_none(query_indices);
  const std::optional<Tensor> query_sizes = contiguous_or_none(query_lengths);
  const Tensor query_entries = as_contiguous(query_values);
  const Tensor columns = as_contiguous(doc_indices), sizes = as_contiguous(doc_lengths);
  // Documents are converted only for float64 queries.
  const Tensor entries = contiguous_as(doc_values, result == ScalarType::Double ? result : doc_values.scalar_type());
  const SparseQueries queries{query_columns ? const_data<int32_t>(*query_columns) : nullptr,
                              query_sizes ? const_data<int32_t>(*query_sizes) : nullptr, query_values.size(0),
                              query_values.size(1)};
  dispatch_floating(entries.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = Accumulator<T>;
    const Documents<T> documents{const_data<int32_t>(columns), const_data<T>(entries), const_data<int32_t>(sizes),
                                 doc_values.size(0),           doc_values.size(1),     num_cols};
    dispatch_floating(query_entries.scalar_type(), [&](auto query_type) {
      using Query = typename decltype(query_type)::type;
      for (int64_t first = 0; first < queries.count; first += kBlockQueries) {
        const QueryBlock<Acc> block(queries, const_data<Query>(query_entries), first,
                                    std::min(kBlockQueries, queries.count - first), num_cols);
        // The result has the type of the documents or their accumulation type.
        if (result == entries.scalar_type()) {
          body(block, documents, Type<T>{});
        } else {
          body(block, documents, Type<Acc>{});
        }
      }
    });
  });
}

}  // namespace splade_fast::cpu
