// search on CUDA: the k documents with the highest scores of each query.
//
// Documents come in waves. The kernel of score hands each finished score to KeepBest, which appends the documents that
// beat the query's bound to a list of the query; a list has room for a whole wave. Where a list has become long, a
// launch behind the wave cuts it to the k best, and the k-th score becomes the bound: later documents have higher ids,
// so an equal score loses the tie. Waves grow with the documents seen, so that few documents pass: among n seen
// documents in random order, about k of the next n do. A list has no order, so each word in it holds a score and an id,
// and words rank as the documents do. At the end, a block sorts the k best of a query.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/host_tables.h"
#include "cuda/score/documents.cuh"
#include "cuda/selection.cuh"

namespace splade_fast::cuda {
namespace {

using score::kMaxQueries;

constexpr int64_t kListBytes = int64_t{128} << 20;  // of the lists of some queries, but for the k best
constexpr int64_t kFirstWave = 8192, kGrowth = 4;   // documents, and the factor by which a wave multiplies those seen
constexpr int64_t kSpare = 2048;                    // words by which a list may exceed k before it is cut
// Documents in host memory are copied in tiles, each once for so many queries.
constexpr int64_t kTileBytes = int64_t{64} << 20, kQueriesPerCopy = 1024;

// A score and the id of its document: larger words come first. 0: none.
template <typename Acc>
struct Ranked {
  using Key = OrderedKey<Acc>;
  using Word = std::conditional_t<sizeof(Acc) == 8, unsigned __int128, uint64_t>;
  static constexpr int kIdBits = 8 * sizeof(Key);

  __device__ static Word word(Key key, int64_t id) {
    return static_cast<Word>(key) << kIdBits | static_cast<Key>(~static_cast<Key>(id));
  }
  __device__ static Key key(Word word) { return static_cast<Key>(word >> kIdBits); }
  __device__ static Acc score(Word word) { return from_key<Acc>(key(word)); }
  __device__ static int64_t id(Word word) { return static_cast<int64_t>(static_cast<Key>(~static_cast<Key>(word))); }
};

struct ListState {
  unsigned long long bound;  // the key that a document has to exceed
  unsigned long long count;
};

// The lists of some queries.
template <typename Acc>
struct Lists {
  typename Ranked<Acc>::Word* words;  // (queries, room)
  ListState* states;                  // (queries,)
  int64_t room;
};

template <typename Acc>
struct KeepBest {
  Lists<Acc> lists;
  int64_t first_id;

  __device__ void operator()(int q, int64_t n, bool is_document, Acc score) const {
    ListState& state = lists.states[q];
    const auto key = to_key(score);
    const bool is_kept = is_document && key > state.bound;
    const unsigned kept = __ballot_sync(kAllLanes, is_kept);
    if (kept == 0) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    unsigned long long place = 0;
    if (lane == 0) place = atomicAdd(&state.count, static_cast<unsigned long long>(__popc(kept)));
    place = __shfl_sync(kAllLanes, place, 0) + __popc(kept & ((1u << lane) - 1));
    if (is_kept) lists.words[q * lists.room + static_cast<int64_t>(place)] = Ranked<Acc>::word(key, first_id + n);
  }
};

// A block per query cuts a list of more than `at_most` words, at least k, to the k best.
template <typename Acc>
__global__ void __launch_bounds__(selection::kThreads, 1) cut_kernel(const Lists<Acc> lists, int k, int at_most) {
  using Word = typename Ranked<Acc>::Word;
  __shared__ selection::Shared<Word> shared;
  ListState& state = lists.states[blockIdx.x];
  Word* words = lists.words + blockIdx.x * lists.room;
  const int count = static_cast<int>(state.count);
  if (count <= at_most) return;
  const Word kth = selection::select_largest(
                       shared, count, k, Word(0), [&](int i) { return words[i]; }, [](Word) { return Word(0); },
                       [&](int, Word word, int place) { words[place] = word; })
                       .kth;
  if (threadIdx.x == 0) state = {Ranked<Acc>::key(kth), static_cast<unsigned long long>(k)};
}

// A block per query sorts the k best and stores them.
template <typename Acc, typename Result>
__global__ void __launch_bounds__(selection::kThreads, 1)
    store_kernel(const Lists<Acc> lists, int k, Result* scores, int64_t* ids) {
  using Word = typename Ranked<Acc>::Word;
  __shared__ selection::Shared<Word> shared;
  const int count = static_cast<int>(lists.states[blockIdx.x].count);
  const Word* best = selection::sort_largest(shared, lists.words + blockIdx.x * lists.room, count, k);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * k;
  for (int place = static_cast<int>(threadIdx.x); place < k; place += selection::kThreads) {
    scores[row + place] = from_acc<Result>(Ranked<Acc>::score(best[place]));
    ids[row + place] = Ranked<Acc>::id(best[place]);
  }
}

// Launchers ------------------------------------------------------------------------------------------------------

// The search of some queries, from `first` on, in documents that come one tile after the other.
template <typename T>
class Search {
  using Acc = Accumulator<T>;
  using Word = typename Ranked<Acc>::Word;

 public:
  Search(const score::Queries& queries, int64_t first, int64_t count, int64_t k, int64_t documents,
         const OnDevice& device)
      : queries_(queries),
        first_(first),
        count_(count),
        k_(static_cast<int>(k)),
        most_(std::max(kListBytes / static_cast<int64_t>(sizeof(Word)) / count, kFirstWave)),
        lists_{nullptr, nullptr, std::min(k + kSpare + most_, documents)},
        words_(new_longs(count * lists_.room * static_cast<int64_t>(sizeof(Word) / sizeof(int64_t)))),
        states_(new_zeros_tensor(queries.values(), std::vector<int64_t>{count, 2}, ScalarType::Long)),
        device_(device) {
    lists_.words = static_cast<Word*>(words_.mutable_data_ptr());
    lists_.states = static_cast<ListState*>(states_.mutable_data_ptr());
  }

  void add(const score::Documents& tile) {
    for (int64_t block = 0; block < count_; block += kMaxQueries) {
      const score::QueryTable<Acc> table(queries_, first_ + block, device_);
      for (int64_t start = 0; start < tile.count();) {
        const int64_t wave =
            std::min({std::max((kGrowth - 1) * (seen_ + start), kFirstWave), most_, tile.count() - start});
        add_wave(table, tile, start, wave, lists_of(block));
        start += wave;
      }
    }
    seen_ += tile.count();
  }

  template <typename Result>
  void store(Result* scores, int64_t* ids) const {
    store_kernel<Acc, Result><<<grid_size(count_), selection::kThreads, 0, device_.stream()>>>(lists_, k_, scores, ids);
  }

 private:
  Tensor new_longs(int64_t count) const {
    return new_tensor(queries_.values(), std::vector<int64_t>{count}, ScalarType::Long);
  }

  Lists<Acc> lists_of(int64_t block) const {
    return {lists_.words + block * lists_.room, lists_.states + block, lists_.room};
  }

  void add_wave(const score::QueryTable<Acc>& table, const score::Documents& tile, int64_t start, int64_t wave,
                const Lists<Acc>& lists) const {
    const T* values = const_data<T>(tile.values()) + start * tile.values().size(1);
    table.score(tile.rows(start, wave), values, KeepBest<Acc>{lists, seen_ + start});
    cut_kernel<Acc><<<grid_size(table.count()), selection::kThreads, 0, device_.stream()>>>(
        lists, k_, static_cast<int>(std::min<int64_t>(k_ + kSpare, INT32_MAX)));
  }

  const score::Queries& queries_;
  int64_t first_, count_;
  int k_;
  int64_t most_;  // documents of a wave
  Lists<Acc> lists_;
  Tensor words_, states_;
  const OnDevice& device_;
  int64_t seen_ = 0;
};

// Calls use(documents) for all documents, of a tile at a time where they lie in host memory.
template <typename Use>
void for_each_tile(const SparseOperands& operands, ScalarType result, const Use& use) {
  const auto& [query_indices, query_values, query_lengths, indices, values, lengths, num_cols] = operands;
  if (!is_in_host_memory(values)) return use(score::Documents(indices, values, lengths, num_cols, result));
  const int64_t row_bytes = values.size(1) * static_cast<int64_t>(sizeof(int32_t) + values.element_size());
  const int64_t most = std::max<int64_t>(kTileBytes / std::max<int64_t>(row_bytes, 1), 1);
  for (int64_t first = 0; first < values.size(0); first += most) {
    const int64_t count = std::min(most, values.size(0) - first);
    const auto copied = [&, &like = query_values](const Tensor& tensor) {
      const Tensor rows = narrowed(tensor, 0, first, count);
      Tensor copy = new_tensor(like, rows.sizes(), rows.scalar_type());
      torch::stable::copy_(copy, rows, /*non_blocking=*/true);
      return copy;
    };
    use(score::Documents(copied(indices), copied(values), copied(lengths), num_cols, result));
  }
}

// Host function --------------------------------------------------------------------------------------------------

template <typename T, typename Result>
void search_all(const SparseOperands& operands, ScalarType result, int64_t k, Result* scores, int64_t* ids,
                const OnDevice& device) {
  const score::Queries queries(operands);
  const int64_t documents = operands.doc_values.size(0), rows = queries.entries().rows;
  const int64_t together = is_in_host_memory(operands.doc_values) ? kQueriesPerCopy : kMaxQueries;
  for (int64_t first = 0; first < rows; first += together) {
    Search<T> search(queries, first, std::min(together, rows - first), k, documents, device);
    for_each_tile(operands, result, [&](const score::Documents& tile) { search.add(tile); });
    search.store(scores + first * k, ids + first * k);
  }
}

std::tuple<Tensor, Tensor> sparse_search(const std::optional<Tensor>& query_indices, const Tensor& query_values,
                                         const std::optional<Tensor>& query_lengths, const Tensor& doc_indices,
                                         const Tensor& doc_values, const Tensor& doc_lengths, int64_t num_cols,
                                         int64_t k) {
  const char* op = "sparse_search";
  check_rows("query_", query_indices, query_values, query_lengths, num_cols);
  check_sparse_rows("doc_", doc_indices, doc_values, doc_lengths, num_cols);
  STD_TORCH_CHECK(doc_values.device() == query_values.device() || is_in_host_memory(doc_values),
                  "doc_values must be on the device of query_values or in host memory");
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  const int64_t documents = doc_values.size(0), taken = std::min(k, documents);
  STD_TORCH_CHECK(documents <= INT32_MAX, "doc_values must have at most ", INT32_MAX, " rows, got ", documents);
  const SparseOperands operands{query_indices, query_values, query_lengths, doc_indices,
                                doc_values,    doc_lengths,  num_cols};
  check_widths(operands);
  const OnDevice device(query_values, op);
  const ScalarType result = promote_types(query_values.scalar_type(), doc_values.scalar_type());
  const std::vector<int64_t> shape{query_values.size(0), taken};
  const Tensor scores = new_tensor(query_values, shape, result);
  const Tensor ids = new_tensor(query_values, shape, ScalarType::Long);
  if (scores.numel() == 0) return {scores, ids};
  const ScalarType read = result == ScalarType::Double ? result : doc_values.scalar_type();
  dispatch_floating(read, [&](auto type) {
    using T = typename decltype(type)::type;
    // The wider of the two types is the type of the documents or the accumulation type.
    if (result == read) {
      search_all<T>(operands, result, taken, mutable_data<T>(scores), mutable_data<int64_t>(ids), device);
    } else {
      search_all<T>(operands, result, taken, mutable_data<Accumulator<T>>(scores), mutable_data<int64_t>(ids), device);
    }
  });
  check_launch(op);
  return {scores, ids};
}

}  // namespace
}  // namespace splade_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CUDA, m) {
  m.impl("sparse_search", TORCH_BOX(&splade_fast::cuda::sparse_search));
}
