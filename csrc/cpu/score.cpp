// score on the CPU: sparse rows x sparse rows -> (Q, N), or the k best documents of each query.
//
// Queries go in blocks of kBlock. Of a block's terms a compact table is built, and the documents run past it once, in
// tiles whose scores stay in the first-level cache; see score_impl.h. Search keeps, per thread and query, the best k so
// far and a bound that most documents fail.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "memory.h"

namespace splade_fast::cpu {
namespace {

constexpr int64_t kBlock = 64;                // queries
constexpr int64_t kTile = 32;                 // documents: with a block of queries, 8 KiB of scores in float
constexpr int64_t kGrain = 512;               // documents of a task, at least
constexpr int64_t kMinCandidates = 256;       // room of a selection beyond the k best
constexpr int64_t kMaxDocuments = INT32_MAX;  // of one search: ids ride in the lower half of a candidate

struct SparseQueries {
  const int32_t* indices;  // nullptr: dense
  const int32_t* lengths;
  int64_t count, width;
};

int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// The queries [first, first + count) as a table with a row per column that any of them has.
template <typename Acc>
class Block {
 public:
  template <typename T>
  Block(const SparseQueries& queries, const T* values, int64_t first, int64_t block_queries, int64_t num_cols)
      : first_(first), count_(block_queries), lanes_(round_up(block_queries, kMaxLanes)), rows_(num_cols + 1) {
    const Scratch<Accumulator<T>> row(queries.width);
    // Twice over the entries: which columns there are, then their values.
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
  // Zeros of dense queries are no entries.
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

// A tile's scores and what its kernel needs, for one thread.
template <typename T>
class Tile {
 public:
  using Acc = Accumulator<T>;

  Tile(const Block<Acc>& block, const Documents<T>& documents)
      : hit_rows_(documents.width + kMaxLanes),
        hit_values_(documents.width + kMaxLanes),
        scores_(kTile * block.lanes()),
        task_{block.rows(),      block.table(),     documents.num_cols, block.lanes(),
              documents.indices, documents.values,  documents.lengths,  documents.width,
              hit_rows_.get(),   hit_values_.get(), scores_.get()} {}

  // (end - begin, lanes); nullptr where a document is not allowed, which is noted in bad.
  const Acc* score(int64_t begin, int64_t end, std::atomic<int64_t>& bad) {
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
void refuse_bad_document(const Documents<T>& documents, int64_t row) {
  if (row < 0) return;
  const int64_t length = documents.lengths[row];
  STD_TORCH_CHECK(length >= 0 && length <= documents.width, "doc_lengths must be between 0 and ", documents.width,
                  ", got ", length, " in row ", row);
  STD_TORCH_CHECK(false, "doc_indices must be between 0 and ", documents.num_cols - 1, " where used, but not in row ",
                  row);
}

template <typename T, typename Result>
void scores_of_block(const Block<Accumulator<T>>& block, const Documents<T>& documents, Result* scores) {
  std::atomic<int64_t> bad{-1};
  torch::stable::parallel_for(0, documents.count, kGrain, [&](int64_t begin, int64_t end) {
    Tile<T> tile(block, documents);
    for (int64_t n = begin; n < end; n += kTile) {
      const int64_t last = std::min(n + kTile, end);
      const auto* found = tile.score(n, last, bad);
      if (!found) return;
      kernels<Result>().store_scores(scores + block.first() * documents.count + n, documents.count, found,
                                     block.lanes(), block.count(), last - n);
    }
  });
  refuse_bad_document(documents, bad);
}

// Search --------------------------------------------------------------------------------------------------------

// Key and id in one number: larger is better, and of equal keys the lower id.
template <typename Acc>
struct Candidates {
  using Key = Position<Acc>;
  using Word = std::conditional_t<sizeof(Acc) == 8, unsigned __int128, uint64_t>;
  using Half = std::make_unsigned_t<Key>;
  static constexpr int kBits = 8 * sizeof(Key);
  static constexpr Half kSign = Half(1) << (kBits - 1);

  static Word pack(Key key, int64_t id) {
    return static_cast<Word>(static_cast<Half>(key) ^ kSign) << kBits | static_cast<Half>(~static_cast<Half>(id));
  }
  static Key key(Word word) { return static_cast<Key>(static_cast<Half>(word >> kBits) ^ kSign); }
  static int64_t id(Word word) { return static_cast<int64_t>(static_cast<Half>(~static_cast<Half>(word))); }

  // The inverse of to_keys() of score_impl.h.
  static Acc score(Word word) {
    constexpr Key kTop = std::numeric_limits<Key>::max();
    const Key value = key(word);
    if (value == kTop) return std::numeric_limits<Acc>::quiet_NaN();
    const Key bits = value < 0 ? value ^ kTop : value;
    Acc result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
  }
};

// The k best candidates of one query, in a buffer that is cut back to them whenever it is full.
template <typename Acc>
class Selection {
 public:
  using Word = typename Candidates<Acc>::Word;
  using Key = Position<Acc>;

  // Documents come by ascending id, so one with the key of the bound is too late.
  void add(Key key, int64_t id, int64_t k, int64_t capacity, Key& bound) {
    if (key <= bound) return;
    words_.push_back(Candidates<Acc>::pack(key, id));
    if (static_cast<int64_t>(words_.size()) < capacity) return;
    cut(k);
    bound = Candidates<Acc>::key(words_[k - 1]);
  }

  // Keeps the k best; the worst of them is the last.
  void cut(int64_t k) {
    if (static_cast<int64_t>(words_.size()) <= k) return;
    std::nth_element(words_.begin(), words_.begin() + (k - 1), words_.end(), std::greater<Word>());
    words_.resize(k);
  }

  const std::vector<Word>& words() const { return words_; }

 private:
  std::vector<Word> words_;
};

template <typename T, typename Result>
void search_block(const Block<Accumulator<T>>& block, const Documents<T>& documents, int64_t k, Result* scores,
                  int64_t* ids) {
  using Acc = Accumulator<T>;
  using Key = Position<Acc>;
  const int64_t parts =
      std::max<int64_t>(std::min<int64_t>(torch::stable::get_num_threads(), documents.count / kGrain), 1);
  const int64_t capacity = k + std::max(k, kMinCandidates);
  std::vector<std::vector<Selection<Acc>>> selections(parts);
  std::atomic<int64_t> bad{-1};
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first_part, int64_t last_part) {
    Tile<T> tile(block, documents);
    const Scratch<Key> keys(kTile * block.lanes());
    const Scratch<int32_t> places(kTile * block.lanes());
    for (int64_t part = first_part; part < last_part; ++part) {
      std::vector<Selection<Acc>> best(block.count());
      // Below every key; lanes without a query take nothing.
      std::vector<Key> bounds(block.lanes(), std::numeric_limits<Key>::max());
      std::fill_n(bounds.begin(), block.count(), std::numeric_limits<Key>::min());
      const int64_t end = documents.count * (part + 1) / parts;
      for (int64_t n = documents.count * part / parts; n < end; n += kTile) {
        const int64_t last = std::min(n + kTile, end);
        const Acc* found = tile.score(n, last, bad);
        if (!found) return;
        const int64_t candidates =
            kernels<T>().find_candidates(found, last - n, block.lanes(), bounds.data(), keys.get(), places.get());
        for (int64_t i = 0; i < candidates; ++i) {
          const int64_t place = places.get()[i], q = place % block.lanes();
          best[q].add(keys.get()[i], n + place / block.lanes(), k, capacity, bounds[q]);
        }
      }
      for (Selection<Acc>& selection : best) selection.cut(k);
      selections[part] = std::move(best);
    }
  });
  refuse_bad_document(documents, bad);
  torch::stable::parallel_for(0, block.count(), 1, [&](int64_t begin, int64_t end) {
    std::vector<typename Selection<Acc>::Word> all;
    std::vector<Acc> ranked(k);
    for (int64_t q = begin; q < end; ++q) {
      all.clear();
      for (const auto& part : selections) all.insert(all.end(), part[q].words().begin(), part[q].words().end());
      std::partial_sort(all.begin(), all.begin() + k, all.end(), std::greater<>());
      const int64_t target = (block.first() + q) * k;
      for (int64_t i = 0; i < k; ++i) {
        ranked[i] = Candidates<Acc>::score(all[i]);
        ids[target + i] = Candidates<Acc>::id(all[i]);
      }
      kernels<Result>().store(scores + target, ranked.data(), k);
    }
  });
}

// Host functions ------------------------------------------------------------------------------------------------

// body(block, documents, Type<Result>{}) for every block of queries.
template <typename Body>
void for_each_block(const std::optional<Tensor>& query_indices, const Tensor& query_values,
                    const std::optional<Tensor>& query_lengths, const Tensor& doc_indices, const Tensor& doc_values,
                    const Tensor& doc_lengths, int64_t num_cols, ScalarType result, Body body) {
  const std::optional<Tensor> query_columns = contiguous_or_none(query_indices);
  const std::optional<Tensor> query_sizes = contiguous_or_none(query_lengths);
  const Tensor query_entries = torch::stable::contiguous(query_values);
  const Tensor columns = torch::stable::contiguous(doc_indices), sizes = torch::stable::contiguous(doc_lengths);
  // Documents meet float64 queries as float64; otherwise they are read as they are.
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
      for (int64_t first = 0; first < queries.count; first += kBlock) {
        const Block<Acc> block(queries, const_data<Query>(query_entries), first,
                               std::min(kBlock, queries.count - first), num_cols);
        // The wider of the two types is that of the documents or the accumulation type.
        if (result == entries.scalar_type()) {
          body(block, documents, Type<T>{});
        } else {
          body(block, documents, Type<Acc>{});
        }
      }
    });
  });
}

Tensor sparse_scores(const std::optional<Tensor>& query_indices, const Tensor& query_values,
                     const std::optional<Tensor>& query_lengths, const Tensor& doc_indices, const Tensor& doc_values,
                     const Tensor& doc_lengths, int64_t num_cols) {
  check_scored(query_indices, query_values, query_lengths, doc_indices, doc_values, doc_lengths, num_cols);
  const ScalarType result = wider_type(query_values.scalar_type(), doc_values.scalar_type());
  const std::vector<int64_t> shape{query_values.size(0), doc_values.size(0)};
  Tensor scores = torch::stable::new_empty(query_values, shape, result);
  prefer_huge_pages(scores);
  for_each_block(query_indices, query_values, query_lengths, doc_indices, doc_values, doc_lengths, num_cols, result,
                 [&](const auto& block, const auto& documents, auto type) {
                   scores_of_block(block, documents, mutable_data<typename decltype(type)::type>(scores));
                 });
  return scores;
}

std::tuple<Tensor, Tensor> sparse_search(const std::optional<Tensor>& query_indices, const Tensor& query_values,
                                         const std::optional<Tensor>& query_lengths, const Tensor& doc_indices,
                                         const Tensor& doc_values, const Tensor& doc_lengths, int64_t num_cols,
                                         int64_t k) {
  check_scored(query_indices, query_values, query_lengths, doc_indices, doc_values, doc_lengths, num_cols);
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  const int64_t documents = doc_values.size(0), taken = std::min(k, documents);
  STD_TORCH_CHECK(documents <= kMaxDocuments, "doc_values must have at most ", kMaxDocuments, " rows, got ", documents);
  const ScalarType result = wider_type(query_values.scalar_type(), doc_values.scalar_type());
  const std::vector<int64_t> shape{query_values.size(0), taken};
  Tensor scores = torch::stable::new_empty(query_values, shape, result);
  Tensor ids = torch::stable::new_empty(query_values, shape, ScalarType::Long);
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
