// Queries of a search in a pruned index, as terms.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu/index/index.h"
#include "cpu/memory.h"
#include "cpu/simd/kernels.h"

namespace splade_fast::cpu {

template <typename Acc>
struct QueryTerm {
  int64_t column;
  Acc weight;
};

// Terms of all queries, those of a query by ascending column.
template <typename Acc>
struct QueryTerms {
  std::vector<QueryTerm<Acc>> terms;
  std::vector<int64_t> start;  // (queries + 1,)

  int64_t count() const { return static_cast<int64_t>(start.size()) - 1; }
  const QueryTerm<Acc>* terms_of(int64_t query) const { return terms.data() + start[query]; }
  int64_t count_of(int64_t query) const { return start[query + 1] - start[query]; }
};

// Weights of equal columns are added in their order.
template <typename Acc>
void merge_columns(std::vector<QueryTerm<Acc>>& terms, int64_t first) {
  const auto is_before = [](const QueryTerm<Acc>& a, const QueryTerm<Acc>& b) { return a.column < b.column; };
  std::stable_sort(terms.begin() + first, terms.end(), is_before);
  int64_t kept = first;
  for (int64_t i = first; i < static_cast<int64_t>(terms.size()); ++i) {
    if (kept > first && terms[kept - 1].column == terms[i].column) {
      terms[kept - 1].weight += terms[i].weight;
    } else {
      terms[kept++] = terms[i];
    }
  }
  terms.resize(kept);
}

// Collect the positive entries of all queries, which are sparse rows, or dense without indices and lengths.
template <typename Acc>
QueryTerms<Acc> collect_terms(const std::optional<Tensor>& indices, const Tensor& values,
                              const std::optional<Tensor>& lengths, int64_t num_cols) {
  const std::optional<Tensor> columns = contiguous_or_none(indices), sizes = contiguous_or_none(lengths);
  const Tensor entries = as_contiguous(values);
  const int64_t width = values.size(1);
  QueryTerms<Acc> queries;
  queries.start.push_back(0);
  dispatch_floating(entries.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t q = 0; q < values.size(0); ++q) {
      const int64_t length = sizes ? const_data<int32_t>(*sizes)[q] : width;
      STD_TORCH_CHECK(length >= 0 && length <= width, "query_lengths must be between 0 and ", width, ", got ", length,
                      " in row ", q);
      for (int64_t j = 0; j < length; ++j) {
        const int64_t column = columns ? const_data<int32_t>(*columns)[q * width + j] : j;
        STD_TORCH_CHECK(column >= 0 && column < num_cols, "query_indices must be between 0 and ", num_cols - 1,
                        " where used, got ", column, " in row ", q);
        const Accumulator<T> value = to_number(const_data<T>(entries)[q * width + j]);
        STD_TORCH_CHECK(value >= 0 && std::isfinite(value), "queries must be finite and at least 0, got ", value,
                        " in row ", q);
        if (value > 0) queries.terms.push_back({column, static_cast<Acc>(value)});
      }
      merge_columns(queries.terms, queries.start.back());
      for (int64_t i = queries.start.back(); i < static_cast<int64_t>(queries.terms.size()); ++i) {
        STD_TORCH_CHECK(std::isfinite(queries.terms[i].weight),
                        "queries must be finite, got an infinite sum for column ", queries.terms[i].column, " in row ",
                        q);
      }
      queries.start.push_back(queries.terms.size());
    }
  });
  return queries;
}

}  // namespace splade_fast::cpu
