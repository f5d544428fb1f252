// sample on the CPU: draws from the scores of dense queries, of sparse queries, or from given scores.
//
// The scores of a block of queries come in tiles of slots that stay in the first-level cache. Each tile adds to the
// logsumexp and leaves the few slots that may be drawn; see block_sampler.h and sample_impl.h. This file is compiled
// without contraction, so that the noise has the same bits everywhere.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/sample/block_sampler.h"
#include "cpu/score/blocks.h"

namespace splade_fast::cpu {
namespace {

using SampleResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kTilesAtOnce = 4;        // register tiles that make up a tile of slots
constexpr int64_t kMaxDenseQueries = 256;  // the packed panels of a block fit the second-level cache

philox::State read_state(const Tensor& state) {
  const Tensor words = as_contiguous(state);
  return philox::unpack_state(const_data<int64_t>(words)[0], const_data<int64_t>(words)[1]);
}

// Dense ------------------------------------------------------------------------------------------------------------

// Converts rows [first, first + count) of a cache to T.
template <typename T, typename Stored>
void convert_rows(const Tensor& cache, int64_t first, int64_t count, T* rows) {
  const int64_t dim = cache.size(1);
  const Scratch<Accumulator<Stored>> row(dim);
  for (int64_t n = 0; n < count; ++n) {
    kernels<Stored>().load(row.get(), const_data<Stored>(cache) + (first + n) * row_stride(cache), dim);
    std::copy_n(row.get(), dim, rows + n * dim);
  }
}

// A packed block of queries, and the cache whose slots are multiplied by it.
template <typename T>
class DenseBlock {
 public:
  using Acc = Accumulator<T>;

  DenseBlock(const Tensor& queries, const Tensor& cache, Acc scale, int64_t first, int64_t count)
      : cache_(cache),
        scale_(scale),
        dim_(queries.size(1)),
        lanes_(round_up(count, std::max(kernels<T>().panel_columns, kMaxLanes))),
        packed_(lanes_ / kernels<T>().panel_columns * panel_bytes()) {
    const int64_t columns = kernels<T>().panel_columns;
    for (int64_t panel = 0; panel * columns < lanes_; ++panel) {
      const int64_t begin = std::min(panel * columns, count);
      kernels<T>().pack(packed_.get() + panel * panel_bytes(), columns,
                        const_data<T>(queries) + (first + begin) * row_stride(queries), row_stride(queries), nullptr,
                        std::min(columns, count - begin), dim_);
    }
  }

  int64_t lanes() const { return lanes_; }

  // Tiles of scores for one thread.
  class Source {
   public:
    explicit Source(const DenseBlock& block)
        : block_(block),
          packed_(kTilesAtOnce * block.tile_bytes()),
          scores_(tile_slots() * block.lanes_),
          rows_(block.is_stored_as_t() ? 0 : tile_slots() * block.dim_) {}

    int64_t tile_slots() const { return kTilesAtOnce * kernels<T>().tile_tokens; }

    Acc* scores(int64_t begin, int64_t end) {
      const Kernels<T>& kernel = kernels<T>();
      const T* rows = rows_.get();
      int64_t stride = block_.dim_;
      if (block_.is_stored_as_t()) {
        stride = row_stride(block_.cache_);
        rows = const_data<T>(block_.cache_) + begin * stride;
      } else {
        block_.convert(begin, end - begin, rows_.get());
      }
      char* packed = packed_.get();
      for (int64_t n = 0; n < end - begin; n += kernel.tile_tokens, packed += block_.tile_bytes()) {
        kernel.pack(packed, kernel.tile_tokens, rows + n * stride, stride, nullptr,
                    std::min(kernel.tile_tokens, end - begin - n), block_.dim_);
      }
      kernel.multiply_slots({packed_.get(), block_.packed_.get(), block_.dim_, end - begin, block_.lanes_,
                             block_.scale_, scores_.get(), block_.row(end), block_.bytes_after(end)});
      return scores_.get();
    }

   private:
    const DenseBlock& block_;
    const Scratch<char> packed_;
    const Scratch<Acc> scores_;
    const Scratch<T> rows_;
  };

  Source source() const { return Source(*this); }

 private:
  int64_t panel_bytes() const { return kernels<T>().packed_bytes(kernels<T>().panel_columns, dim_); }
  int64_t tile_bytes() const { return kernels<T>().packed_bytes(kernels<T>().tile_tokens, dim_); }

  // bfloat16 and float16 meet as float, so types of equal size are equal.
  bool is_stored_as_t() const { return sizeof(T) == cache_.element_size(); }

  const char* row(int64_t slot) const { return static_cast<const char*>(cache_.const_data_ptr()) + slot * row_bytes(); }
  int64_t row_bytes() const { return row_stride(cache_) * static_cast<int64_t>(cache_.element_size()); }

  // Bytes of the tile from this slot on, to prefetch; 0 if its rows are not neighbours.
  int64_t bytes_after(int64_t slot) const {
    const int64_t tile = kTilesAtOnce * kernels<T>().tile_tokens;
    return row_stride(cache_) == dim_ ? std::min(tile, cache_.size(0) - slot) * row_bytes() : 0;
  }

  void convert(int64_t first, int64_t count, T* rows) const {
    dispatch_floating(cache_.scalar_type(), [&](auto type) {
      using Stored = typename decltype(type)::type;
      if constexpr (sizeof(Stored) < sizeof(T)) convert_rows<T, Stored>(cache_, first, count, rows);
    });
  }

  const Tensor& cache_;
  const Acc scale_;
  const int64_t dim_, lanes_;
  const Scratch<char> packed_;
};

SampleResult sample_dense(const Tensor& queries, const Tensor& cache, const Tensor& state, int64_t num_samples,
                          double scale, double inv_temp, std::optional<int64_t> top_k, bool exact,
                          const std::optional<Tensor>& valid, const std::optional<Tensor>& exclude, int64_t slot_offset,
                          int64_t query_offset) {
  const SampleOptions options{num_samples, scale, inv_temp, top_k, exact, slot_offset, query_offset};
  check_dense_cache(queries, cache);
  const int64_t batch = queries.size(0), slots = cache.size(0);
  check_sample(options, {valid, exclude}, state, cache, batch, slots);
  const ScalarType dtype = promote_types(queries.scalar_type(), cache.scalar_type());
  const Samples samples(cache, accumulation_type(dtype), batch, num_samples);
  const SampleMasks masks = contiguous_masks({valid, exclude});
  const philox::State noise = read_state(state);
  const Tensor rows = contiguous_rows(cache), query_rows = contiguous_as(queries, dtype);
  dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = Accumulator<T>;
    for (int64_t first = 0; first < batch; first += kMaxDenseQueries) {
      const int64_t count = std::min(kMaxDenseQueries, batch - first);
      const DenseBlock<T> block(query_rows, rows, static_cast<Acc>(scale), first, count);
      BlockSampler<Acc> sampler(options, masks, noise, slots, first, count, block.lanes());
      sampler.run([&] { return block.source(); });
      sampler.store(samples, first);
    }
  });
  return samples.tuple();
}

// Sparse -----------------------------------------------------------------------------------------------------------

template <typename T>
class SparseSource {
 public:
  using Acc = Accumulator<T>;

  SparseSource(const QueryBlock<Acc>& block, const Documents<T>& documents, Acc scale, std::atomic<int64_t>& bad)
      : lanes_(block.lanes()), scale_(scale), bad_(bad), tile_(block, documents) {}

  int64_t tile_slots() const { return kTileDocuments; }

  Acc* scores(int64_t begin, int64_t end) {
    Acc* scores = tile_.score(begin, end, bad_);
    if (scores && scale_ != 1) {
      for (int64_t i = 0; i < (end - begin) * lanes_; ++i) scores[i] *= scale_;
    }
    return scores;
  }

 private:
  const int64_t lanes_;
  const Acc scale_;
  std::atomic<int64_t>& bad_;
  DocumentTile<T> tile_;
};

SampleResult sample_sparse(const std::optional<Tensor>& query_indices, const Tensor& query_values,
                           const std::optional<Tensor>& query_lengths, const Tensor& doc_indices,
                           const Tensor& doc_values, const Tensor& doc_lengths, int64_t num_cols, const Tensor& state,
                           int64_t num_samples, double scale, double inv_temp, std::optional<int64_t> top_k, bool exact,
                           const std::optional<Tensor>& valid, const std::optional<Tensor>& exclude,
                           int64_t slot_offset, int64_t query_offset) {
  const SampleOptions options{num_samples, scale, inv_temp, top_k, exact, slot_offset, query_offset};
  check_score_inputs(query_indices, query_values, query_lengths, doc_indices, doc_values, doc_lengths, num_cols);
  const int64_t batch = query_values.size(0), slots = doc_values.size(0);
  check_sample(options, {valid, exclude}, state, doc_values, batch, slots);
  const ScalarType dtype = accumulation_type(promote_types(query_values.scalar_type(), doc_values.scalar_type()));
  const Samples samples(doc_values, dtype, batch, num_samples);
  const SampleMasks masks = contiguous_masks({valid, exclude});
  const philox::State noise = read_state(state);
  for_each_block(query_indices, query_values, query_lengths, doc_indices, doc_values, doc_lengths, num_cols, dtype,
                 [&](const auto& block, const auto& documents, auto) {
                   using T = std::remove_cv_t<std::remove_pointer_t<decltype(documents.values)>>;
                   using Acc = Accumulator<T>;
                   std::atomic<int64_t> bad{-1};
                   BlockSampler<Acc> sampler(options, masks, noise, slots, block.first(), block.count(), block.lanes());
                   sampler.run([&] { return SparseSource<T>(block, documents, static_cast<Acc>(scale), bad); });
                   report_bad_document(documents, bad);
                   sampler.store(samples, block.first());
                 });
  return samples.tuple();
}

// Given scores -----------------------------------------------------------------------------------------------------

// Tiles of given scores. A row of scores belongs to a query and becomes a lane.
template <typename T>
class GivenSource {
 public:
  using Acc = Accumulator<T>;

  GivenSource(const Tensor& scores, int64_t first, int64_t queries, int64_t lanes)
      : scores_(scores), first_(first), queries_(queries), lanes_(lanes), rows_(lanes * kSlots), tile_(kSlots * lanes) {
    std::fill_n(tile_.get(), kSlots * lanes, Acc(0));
  }

  int64_t tile_slots() const { return kSlots; }

  Acc* scores(int64_t begin, int64_t end) {
    for (int64_t q = 0; q < queries_; ++q) {
      kernels<T>().load(rows_.get() + q * kSlots, const_data<T>(scores_) + (first_ + q) * row_stride(scores_) + begin,
                        end - begin);
    }
    kernels<Acc>().store_scores(tile_.get(), lanes_, rows_.get(), kSlots, end - begin, queries_);
    return tile_.get();
  }

 private:
  static constexpr int64_t kSlots = 64;

  const Tensor& scores_;
  const int64_t first_, queries_, lanes_;
  const Scratch<Acc> rows_, tile_;
};

SampleResult sample_scores(const Tensor& scores, const Tensor& state, int64_t num_samples, double inv_temp,
                           const std::optional<Tensor>& valid, int64_t slot_offset, int64_t query_offset) {
  const SampleOptions options{num_samples, 1.0, inv_temp, std::nullopt, false, slot_offset, query_offset};
  check_floating("scores", scores, 2);
  const int64_t batch = scores.size(0), columns = scores.size(1);
  check_sample(options, {valid, std::nullopt}, state, scores, batch, columns);
  const Samples samples(scores, accumulation_type(scores.scalar_type()), batch, num_samples);
  const SampleMasks masks = contiguous_masks({valid, std::nullopt});
  const philox::State noise = read_state(state);
  const Tensor rows = contiguous_rows(scores);
  dispatch_floating(scores.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t first = 0; first < batch; first += kBlockQueries) {
      const int64_t count = std::min(kBlockQueries, batch - first), lanes = round_up(count, kMaxLanes);
      BlockSampler<Accumulator<T>> sampler(options, masks, noise, columns, first, count, lanes);
      sampler.run([&] { return GivenSource<T>(rows, first, count, lanes); });
      sampler.store(samples, first);
    }
  });
  return samples.tuple();
}

}  // namespace
}  // namespace splade_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CPU, m) {
  m.impl("sample_dense", TORCH_BOX(&splade_fast::cpu::sample_dense));
  m.impl("sample_sparse", TORCH_BOX(&splade_fast::cpu::sample_sparse));
  m.impl("sample_scores", TORCH_BOX(&splade_fast::cpu::sample_scores));
}
