// score and search on the CPU: sparse queries and documents to scores (Q, N), or to the k best documents of each query.
//
// Documents are scored against blocks of queries, see blocks.h. Search keeps the k best documents so far of each thread
// and query, and a bound below which scores are skipped.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/score/blocks.h"
#include "cpu/score/selection.h"

namespace splade_fast::cpu {
namespace {

constexpr int64_t kGrain = 512;               // smallest number of documents of a task
constexpr int64_t kMaxDocuments = INT32_MAX;  // ids are packed into half a word, see selection.h

template <typename T, typename Result>
void score_block(const QueryBlock<Accumulator<T>>& block, const Documents<T>& documents, Result* scores) {
  std::atomic<int64_t> bad{-1};
  torch::stable::parallel_for(0, documents.count, kGrain, [&](int64_t begin, int64_t end) {
    DocumentTile<T> tile(block, documents);
    for (int64_t n = begin; n < end; n += kTileDocuments) {
      const int64_t last = std::min(n + kTileDocuments, end);
      const auto* found = tile.score(n, last, bad);
      if (!found) return;
      kernels<Result>().store_scores(scores + block.first() * documents.count + n, documents.count, found,
                                     block.lanes(), block.count(), last - n);
    }
  });
  report_bad_document(documents, bad);
}

template <typename T, typename Result>
void search_block(const QueryBlock<Accumulator<T>>& block, const Documents<T>& documents, int64_t k, Result* scores,
                  int64_t* ids) {
  using Acc = Accumulator<T>;
  using Key = SortKey<Acc>;
  const int64_t parts =
      std::max<int64_t>(std::min<int64_t>(torch::stable::get_num_threads(), documents.count / kGrain), 1);
  const int64_t capacity = k + std::max(k, kMinSpare);
  std::vector<std::vector<Selection<Acc>>> selections(parts);
  std::atomic<int64_t> bad{-1};
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first_part, int64_t last_part) {
    DocumentTile<T> tile(block, documents);
    const Scratch<Key> keys(kTileDocuments * block.lanes());
    const Scratch<int32_t> places(kTileDocuments * block.lanes());
    for (int64_t part = first_part; part < last_part; ++part) {
      std::vector<Selection<Acc>> best(block.count());
      // The bound of a query starts below every key, that of a lane without a query above every key.
      std::vector<Key> bounds(block.lanes(), std::numeric_limits<Key>::max());
      std::fill_n(bounds.begin(), block.count(), std::numeric_limits<Key>::min());
      const int64_t end = documents.count * (part + 1) / parts;
      for (int64_t n = documents.count * part / parts; n < end; n += kTileDocuments) {
        const int64_t last = std::min(n + kTileDocuments, end);
        const Acc* found = tile.score(n, last, bad);
        if (!found) return;
        const int64_t above =
            kernels<T>().find_above_bounds(found, last - n, block.lanes(), bounds.data(), keys.get(), places.get());
        for (int64_t i = 0; i < above; ++i) {
          const int64_t place = places.get()[i], q = place % block.lanes();
          best[q].add(keys.get()[i], n + place / block.lanes(), k, capacity, bounds[q]);
        }
      }
      for (Selection<Acc>& selection : best) selection.cut(k);
      selections[part] = std::move(best);
    }
  });
  report_bad_document(documents, bad);
  torch::stable::parallel_for(0, block.count(), 1, [&](int64_t begin, int64_t end) {
    std::vector<typename Selection<Acc>::Word> all;
    std::vector<Acc> ranked(k);
    for (int64_t q = begin; q < end; ++q) {
      all.clear();
      for (const auto& part : selections) all.insert(all.end(), part[q].words().begin(), part[q].words().end());
      std::partial_sort(all.begin(), all.begin() + k, all.end(), std::greater<>());
      const int64_t target = (block.first() + q) * k;
      for (int64_t i = 0; i < k; ++i) {
        ranked[i] = RankedWord<Acc>::score(all[i]);
        ids[target + i] = RankedWord<Acc>::id(all[i]);
      }
      kernels<Result>().store(scores + target, ranked.data(), k);
    }
  });
}

// Ops -----------------------------------------------------------------------------------------------------------

Tensor sparse_scores(const std::optional<Tensor>& query_indices, const Tensor& query_values,
                     const std::optional<Tensor>& query_lengths, const Tensor& doc_indices, const Tensor& doc_values,
                     const Tensor& doc_lengths, int64_t num_cols) {
  check_score_inputs(query_indices, query_values, query_lengths, doc_indices, doc_values, doc_lengths, num_cols);
  const ScalarType result = promote_types(query_values.scalar_type(), doc_values.scalar_type());
  const std::vector<int64_t> shape{query_values.size(0), doc_values.size(0)};
  Tensor scores = new_tensor(query_values, shape, result);
  prefer_huge_pages(scores);
  for_each_block(query_indices, query_values, query_lengths, doc_indices, doc_values, doc_lengths, num_cols, result,
                 [&](const auto& block, const auto& documents, auto type) {
                   score_block(block, documents, mutable_data<typename decltype(type)::type>(scores));
                 });
  return scores;
}

std::tuple<Tensor, Tensor> sparse_search(const std::optional<Tensor>& query_indices, const Tensor& query_values,
                                         const std::optional<Tensor>& query_lengths, const Tensor& doc_indices,
                                         const Tensor& doc_values, const Tensor& doc_lengths, int64_t num_cols,
                                         int64_t k) {
  check_score_inputs(query_indices, query_values, query_lengths, doc_indices, doc_values, doc_lengths, num_cols);
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  const int64_t documents = doc_values.size(0), taken = std::min(k, documents);
  STD_TORCH_CHECK(documents <= kMaxDocuments, "doc_values must have at most ", kMaxDocuments, " rows, got ", documents);
  const ScalarType result = promote_types(query_values.scalar_type(), doc_values.scalar_type());
  const std::vector<int64_t> shape{query_values.size(0), taken};
  Tensor scores = new_tensor(query_values, shape, result);
  Tensor ids = new_tensor(query_values, shape, ScalarType::Long);
  if (scores.numel() == 0) return {scores, ids};
  for_each_block(query_indices, query_values, query_lengths, doc_indices, doc_values, doc_lengths, num_cols, result,
                 [&](const auto& block, const auto& rows, auto type) {
                   using Result = typename decltype(type)::type;
                   search_block(block, rows, taken, mutable_data<Result>(scores), mutable_data<int64_t>(ids));
                 });
  return {scores, ids};
}

}  // namespace
}  // namespace splade_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CPU, m) {
  m.impl("sparse_scores", TORCH_BOX(&splade_fast::cpu::sparse_scores));
  m.impl("sparse_search", TORCH_BOX(&splade_fast::cpu::sparse_search));
}
