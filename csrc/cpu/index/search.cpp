// Search in a pruned index, by one of two algorithms for each query. Blocks: all blocks get an upper bound; groups are
// then scored, those with the highest bound of a block first, until no bound reaches the score of the k-th best
// document. Accumulators: all documents are scored, one term after another.
//
// Where there are fewer queries than threads, each thread searches a range of the groups, and all share the highest
// score that k documents of one range reach.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>

#include "cpu/index/bounds.h"
#include "cpu/index/ranking.h"

namespace splade_fast::cpu {
namespace {

constexpr int kRounds = 64;        // ranges of bounds that are visited one after another
constexpr int64_t kMinRange = 64;  // groups of a range of its own; fewer take about the time of a thread's start
constexpr int64_t kWindow = 128;   // groups whose accumulators stay in a core's cache

// Accumulators take less time for a query with so many terms: the more terms, and the larger the share of the documents
// that is asked for, the more groups the bounds leave. docs/search.md has the measurements.
inline double least_accumulated_terms(int64_t documents, int64_t k) {
  return 5 * std::pow(static_cast<double>(documents) / k, 0.25);
}

enum class Algorithm { kAuto, kBlocks, kAccumulators };

struct Filter {
  double least;         // a document must score at least as much
  const bool* allowed;  // (documents,) by id, or nullptr for all
  bool admits(int64_t id) const { return !allowed || allowed[id]; }
};

struct GroupRange {
  int64_t first, count;
};

// Score that k documents reach, over all ranges of a query.
template <typename Acc>
class SharedThreshold {
 public:
  Acc score() const { return score_.load(std::memory_order_relaxed); }
  void raise(Acc score) {
    Acc known = this->score();
    while (score > known && !score_.compare_exchange_weak(known, score, std::memory_order_relaxed)) {
    }
  }

 private:
  std::atomic<Acc> score_{0};
};

// Scratch memory of one thread, and the search of one query after another in a range of the groups. A function that
// returns false has read a number out of range, from an index that index_fill has not written.
template <typename T, typename Acc>
class Searcher {
 public:
  Searcher(const PrunedIndex<T>& index, const GroupRange& range, const Filter& filter, int64_t k, Algorithm algorithm)
      : index_(index),
        postings_{index.start, index.document, index.value, index.postings},
        range_(range),
        filter_(filter),
        k_(k),
        algorithm_(algorithm),
        ranking_(k, smallest_at_least(filter.least)) {}

  bool search(const QueryTerm<Acc>* terms, int64_t count, SharedThreshold<Acc>& shared) {
    shared_ = &shared;
    ranking_.clear();
    known_.clear();
    for (int64_t t = 0; t < count; ++t) {
      if (index_.step[terms[t].column] > 0) known_.push_back(terms[t]);
    }
    return find_entries() && (should_accumulate() ? accumulate() : search_blocks());
  }

  // The documents with positive scores that the search has found, best first.
  const std::vector<typename Ranking<Acc>::Word>& ranked() { return ranking_.sort(); }

 private:
  // The smallest number that is at least `least` and positive.
  static Acc smallest_at_least(double least) {
    Acc number = static_cast<Acc>(least);
    if (!(number > 0)) number = std::numeric_limits<Acc>::denorm_min();
    if (number < least) number = std::nextafter(number, std::numeric_limits<Acc>::infinity());
    return number;
  }

  // The entries of each term in the range.
  bool find_entries() {
    entries_.clear();
    for (const QueryTerm<Acc>& term : known_) {
      TermEntries entries{index_.group, index_.maximum, index_.term_start[term.column],
                          index_.term_start[term.column + 1], range_.first};
      if (entries.begin < 0 || entries.begin > entries.end || entries.end > index_.entries) return false;
      if (range_.count < index_.groups()) {
        const int32_t *const begin = index_.group + entries.begin, *const end = index_.group + entries.end;
        entries.begin = std::lower_bound(begin, end, range_.first) - index_.group;
        entries.end = std::lower_bound(begin, end, range_.first + range_.count) - index_.group;
      }
      entries_.push_back(entries);
    }
    return true;
  }

  bool should_accumulate() const {
    if (algorithm_ != Algorithm::kAuto) return algorithm_ == Algorithm::kAccumulators;
    return known_.size() >= least_accumulated_terms(index_.documents, k_);
  }

  bool accumulate() {
    accumulators_.resize(std::min(kWindow, range_.count) * kGroupDocuments);
    for (int64_t first = 0; first < range_.count; first += kWindow) {
      const int64_t groups = std::min(kWindow, range_.count - first);
      std::fill_n(accumulators_.begin(), groups * kGroupDocuments, Acc{0});
      for (size_t t = 0; t < known_.size(); ++t) {
        TermEntries& entries = entries_[t];
        entries.first_group = range_.first + first;
        entries.begin = kernels_.add_term(postings_, entries, known_[t].weight, groups, accumulators_.data());
        if (entries.begin < 0) return false;
      }
      for (int64_t group = 0; group < groups; ++group) {
        if (!rank(first + group, accumulators_.data() + group * kGroupDocuments)) return false;
      }
    }
    return std::all_of(entries_.begin(), entries_.end(), [](const auto& rest) { return rest.begin == rest.end; });
  }

  bool search_blocks() {
    bounds_.assign(range_.count * kGroupBlocks, 0.0f);
    group_bounds_.resize(range_.count + kMaxLanes);
    found_groups_.resize(range_.count + kMaxLanes);
    const Bounds<Acc> bounds(index_, known_.data(), known_.size());
    return read_terms(bounds) && visit_groups(bounds);
  }

  bool read_terms(const Bounds<Acc>& bounds) {
    const int64_t count = known_.size(), groups = range_.count;
    entry_.assign(count * groups, -1);
    weight_.resize(count);
    postings_of_term_.resize(count + 1);
    for (int64_t t = 0; t < count; ++t) {
      weight_[t] = known_[t].weight;
      int32_t* const entry = entry_.data() + t * groups;
      if (!index_kernels().add_bounds(entries_[t], bounds.weight(t), groups, bounds_.data(), entry)) return false;
    }
    return true;
  }

  // A group is scored as a whole if a document of it may be ranked, which costs no more than to score single blocks.
  bool visit_groups(const Bounds<Acc>& bounds) {
    index_kernels().group_bounds(bounds_.data(), range_.count, group_bounds_.data());
    const float largest = *std::max_element(group_bounds_.begin(), group_bounds_.end());
    float limit = std::numeric_limits<float>::infinity();
    for (int round = kRounds - 1; round >= 0 && bounds.score(limit) >= ranking_.threshold(); --round) {
      // Groups without a term of the query have bound 0, and are never visited.
      const float least = std::max(largest * round / kRounds, std::numeric_limits<float>::min());
      const int64_t count =
          index_kernels().find_bounds(group_bounds_.data(), range_.count, least, limit, found_groups_.data());
      for (int64_t i = 0; i < count; ++i) {
        ranking_.raise_threshold(shared_->score());
        const bool may_rank = bounds.score(group_bounds_[found_groups_[i]]) >= ranking_.threshold();
        if (!may_rank) continue;
        if (!rank_group(found_groups_[i])) return false;
      }
      limit = least;
    }
    return true;
  }

  // group: its place in the range.
  bool rank_group(int64_t group) {
    const PostingsQuery<T, Acc> query{static_cast<int64_t>(known_.size()),
                                      weight_.data(),
                                      entry_.data(),
                                      range_.count,
                                      postings_,
                                      postings_of_term_.data(),
                                      scores_};
    return kernels_.score_group(query, group) && rank(group, scores_);
  }

  // Rank the documents of a group by their scores.
  bool rank(int64_t group, const Acc* scores) {
    ranking_.raise_threshold(shared_->score());
    const int64_t count = kernels_.find_scores(scores, ranking_.threshold_key(), found_);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = (range_.first + group) * kGroupDocuments + found_[i];
      const int64_t id = place < index_.documents ? index_.id[place] : -1;
      if (id < 0 || id >= index_.documents) return false;
      if (filter_.admits(id)) ranking_.add(scores[found_[i]], static_cast<int32_t>(id));
    }
    if (count > 0) shared_->raise(ranking_.threshold());
    return true;
  }

  const PrunedIndex<T>& index_;
  const Postings<T> postings_;
  const PostingsKernels<T, Acc>& kernels_ = postings_kernels<T, Acc>();
  const GroupRange range_;
  const Filter& filter_;
  const int64_t k_;
  const Algorithm algorithm_;
  SharedThreshold<Acc>* shared_ = nullptr;
  Ranking<Acc> ranking_;
  std::vector<QueryTerm<Acc>> known_;  // terms of the query that the index has
  std::vector<TermEntries> entries_;   // of each term in the range
  std::vector<Acc> accumulators_;      // scores of a window of groups
  std::vector<Acc> weight_;
  std::vector<float> bounds_, group_bounds_;  // of blocks, and the largest one of each group
  std::vector<int32_t> entry_, found_groups_;
  std::vector<FoundPostings<Acc>> postings_of_term_;
  alignas(64) Acc scores_[kGroupDocuments];
  int32_t found_[kGroupDocuments];
};

// Fill the places after the ranked documents: with documents that score 0, by ascending id, and then with id -1 and
// score -inf.
template <typename Acc>
void fill_places(const Filter& filter, int64_t documents, int64_t ranked, int64_t k, Acc* scores, int64_t* ids) {
  int64_t place = ranked;
  if (filter.least <= 0) {
    std::vector<int64_t> taken(ids, ids + ranked);
    std::sort(taken.begin(), taken.end());
    auto next = taken.begin();
    for (int64_t id = 0; id < documents && place < k; ++id) {
      if (next != taken.end() && *next == id) {
        ++next;
      } else if (filter.admits(id)) {
        scores[place] = 0;
        ids[place++] = id;
      }
    }
  }
  for (; place < k; ++place) {
    scores[place] = -std::numeric_limits<Acc>::infinity();
    ids[place] = -1;
  }
}

// Results (queries, k) of a search.
template <typename Acc, typename Result>
struct Results {
  using Word = typename Ranking<Acc>::Word;
  const Filter& filter;
  int64_t documents, k;
  Algorithm algorithm;
  Result* scores;
  int64_t* ids;

  // words: the best documents of a query, best first.
  void store(int64_t query, const std::vector<Word>& words) const {
    std::vector<Acc> ranked(k);
    int64_t* const own_ids = ids + query * k;
    for (size_t i = 0; i < words.size(); ++i) {
      ranked[i] = RankedWord<Acc>::score(words[i]);
      own_ids[i] = RankedWord<Acc>::id(words[i]);
    }
    fill_places(filter, documents, words.size(), k, ranked.data(), own_ids);
    kernels<Result>().store(scores + query * k, ranked.data(), k);
  }
};

// Search each query by one thread.
template <typename T, typename Acc, typename Result>
bool search_queries(const PrunedIndex<T>& index, const QueryTerms<Acc>& queries, const Results<Acc, Result>& results) {
  std::atomic<bool> is_damaged{false};
  torch::stable::parallel_for(0, queries.count(), 1, [&](int64_t begin, int64_t end) {
    Searcher<T, Acc> searcher(index, {0, index.groups()}, results.filter, results.k, results.algorithm);
    for (int64_t q = begin; q < end; ++q) {
      SharedThreshold<Acc> own;
      if (!searcher.search(queries.terms_of(q), queries.count_of(q), own)) {
        is_damaged = true;
        return;
      }
      results.store(q, searcher.ranked());
    }
  });
  return !is_damaged;
}

// Search each query in several ranges of the groups at once.
template <typename T, typename Acc, typename Result>
bool search_ranges(const PrunedIndex<T>& index, const QueryTerms<Acc>& queries, int64_t ranges,
                   const Results<Acc, Result>& results) {
  std::atomic<bool> is_damaged{false};
  const int64_t count = queries.count(), groups = index.groups();
  std::vector<SharedThreshold<Acc>> shared(count);
  std::vector<std::vector<typename Ranking<Acc>::Word>> found(count * ranges);
  torch::stable::parallel_for(0, count * ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t q = i / ranges, range = i % ranges;
      const int64_t first = groups * range / ranges, last = groups * (range + 1) / ranges;
      Searcher<T, Acc> searcher(index, {first, last - first}, results.filter, results.k, results.algorithm);
      if (!searcher.search(queries.terms_of(q), queries.count_of(q), shared[q])) {
        is_damaged = true;
        return;
      }
      found[i] = searcher.ranked();
    }
  });
  if (is_damaged) return false;
  for (int64_t q = 0; q < count; ++q) {
    auto& best = found[q * ranges];
    for (int64_t i = q * ranges + 1; i < (q + 1) * ranges; ++i)
      best.insert(best.end(), found[i].begin(), found[i].end());
    std::sort(best.begin(), best.end(), std::greater<>());
    best.resize(std::min<size_t>(best.size(), results.k));
    results.store(q, best);
  }
  return true;
}

template <typename T, typename Acc, typename Result>
void search_all(const PrunedIndex<T>& index, const QueryTerms<Acc>& queries, const Results<Acc, Result>& results) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t ranges = queries.count() == 0 ? 1 : std::min(threads / queries.count(), index.groups() / kMinRange);
  const bool is_sound =
      ranges > 1 ? search_ranges(index, queries, ranges, results) : search_queries(index, queries, results);
  STD_TORCH_CHECK(is_sound, "index must be one that index_fill has written, got places out of range");
}

Algorithm parse_algorithm(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= 2, "algorithm must be 0, 1 or 2, got ", code);
  return static_cast<Algorithm>(code);
}

std::tuple<Tensor, Tensor> index_search(const std::optional<Tensor>& query_indices, const Tensor& query_values,
                                        const std::optional<Tensor>& query_lengths, const std::vector<Tensor>& tensors,
                                        int64_t k, double min_score, const std::optional<Tensor>& allowed,
                                        int64_t algorithm) {
  const Algorithm chosen = parse_algorithm(algorithm);
  std::optional<std::tuple<Tensor, Tensor>> result;
  with_index(tensors, [&](const auto& index) {
    check_rows("query_", query_indices, query_values, query_lengths, index.num_cols);
    STD_TORCH_CHECK(query_values.is_cpu(), "query_values must be on the CPU");
    STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
    STD_TORCH_CHECK(!std::isnan(min_score), "min_score must be a number, got nan");
    STD_TORCH_CHECK(!allowed || (allowed->scalar_type() == ScalarType::Bool && allowed->dim() == 1 &&
                                 allowed->size(0) == index.documents && allowed->is_contiguous()),
                    "allowed must be contiguous bool (", index.documents, ",), got ", describe(*allowed));
    const Filter filter{min_score, allowed ? const_data<bool>(*allowed) : nullptr};
    using T = std::remove_const_t<std::remove_pointer_t<decltype(index.value)>>;
    const ScalarType stored = tensors[IndexTensors::kValue].scalar_type();
    const ScalarType dtype = promote_types(query_values.scalar_type(), stored);
    const int64_t taken = std::min(k, index.documents);
    const std::vector<int64_t> shape{query_values.size(0), taken};
    result = {new_tensor(query_values, shape, dtype), new_tensor(query_values, shape, ScalarType::Long)};
    auto& [scores, ids] = *result;
    const auto run = [&](auto acc, auto rounded) {
      using Acc = typename decltype(acc)::type;
      using Result = typename decltype(rounded)::type;
      const QueryTerms<Acc> queries = collect_terms<Acc>(query_indices, query_values, query_lengths, index.num_cols);
      if (taken == 0) return;
      const Results<Acc, Result> results{
          filter, index.documents, taken, chosen, mutable_data<Result>(scores), mutable_data<int64_t>(ids)};
      search_all(index, queries, results);
    };
    if (dtype == ScalarType::Double) {
      run(Type<double>{}, Type<double>{});
    } else if constexpr (!std::is_same_v<T, double>) {
      if (dtype == stored) {
        run(Type<float>{}, Type<T>{});
      } else {
        run(Type<float>{}, Type<float>{});
      }
    }
  });
  return *result;
}

}  // namespace
}  // namespace splade_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CPU, m) { m.impl("index_search", TORCH_BOX(&splade_fast::cpu::index_search)); }
