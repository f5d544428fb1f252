// score on CUDA: sparse rows x sparse rows -> (Q, N), for blocks of queries as documents.cuh says.
#include <torch/csrc/stable/library.h>

#include "cuda/score/documents.cuh"

namespace splade_fast::cuda {
namespace {

// A warp stores neighbouring documents of a query.
template <typename Acc, typename Result>
struct StoreScores {
  Result* scores;
  int64_t documents;

  __device__ void operator()(int q, int64_t n, bool is_document, Acc score) const {
    if (is_document) scores[q * documents + n] = from_acc<Result>(score);
  }
};

template <typename T, typename Result>
void score_all(const score::Queries& queries, const score::Documents& documents, Result* scores,
               const OnDevice& device) {
  using Acc = Accumulator<T>;
  for (int64_t first = 0; first < queries.entries().rows; first += score::kMaxQueries) {
    score::QueryTable<Acc>(queries, first, device)
        .score(documents.rows(0, documents.count()), const_data<T>(documents.values()),
               StoreScores<Acc, Result>{scores + first * documents.count(), documents.count()});
  }
}

}  // namespace

Tensor sparse_products(const SparseOperands& operands, ScalarType result, const OnDevice& device) {
  const Tensor& query_values = operands.query_values;
  check_widths(operands);
  const Tensor scores =
      new_tensor(query_values, std::vector<int64_t>{query_values.size(0), operands.doc_values.size(0)}, result);
  if (scores.numel() == 0) return scores;
  const score::Queries queries(operands);
  const score::Documents documents(operands.doc_indices, operands.doc_values, operands.doc_lengths, operands.num_cols,
                                   result);
  dispatch_floating(documents.values().scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    // The wider of the two types is the type of the documents or the accumulation type.
    if (result == documents.values().scalar_type()) {
      score_all<T>(queries, documents, mutable_data<T>(scores), device);
    } else {
      score_all<T>(queries, documents, mutable_data<Accumulator<T>>(scores), device);
    }
  });
  return scores;
}

namespace {

Tensor sparse_scores(const std::optional<Tensor>& query_indices, const Tensor& query_values,
                     const std::optional<Tensor>& query_lengths, const Tensor& doc_indices, const Tensor& doc_values,
                     const Tensor& doc_lengths, int64_t num_cols) {
  const char* op = "sparse_scores";
  check_score_inputs(query_indices, query_values, query_lengths, doc_indices, doc_values, doc_lengths, num_cols);
  const OnDevice device(doc_values, op);
  const Tensor scores =
      sparse_products({query_indices, query_values, query_lengths, doc_indices, doc_values, doc_lengths, num_cols},
                      promote_types(query_values.scalar_type(), doc_values.scalar_type()), device);
  check_launch(op);
  return scores;
}

}  // namespace
}  // namespace splade_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CUDA, m) {
  m.impl("sparse_scores", TORCH_BOX(&splade_fast::cuda::sparse_scores));
}
