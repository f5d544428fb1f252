// Scores of documents against a block of queries, for score and search.
//
// A block of at most kMaxQueries queries becomes a dense table (num_cols, lanes) that stays in the second-level cache,
// and a bit for each column that any of its queries has. A warp takes a document: its lanes read entries and look up
// the bits, and each hit adds value x table row, a query or two per lane. The sum of a pair runs over ascending columns
// only, so it does not depend on the block or the grid. Entries outside the columns are skipped: reporting them would
// need to wait for the device.
#pragma once

#include "cuda/score/score.h"
#include "cuda/warp.cuh"

namespace splade_fast::cuda::score {

constexpr int kWarps = 8;  // of a block
constexpr int kThreads = kWarps * kWarp;
constexpr int kBlocks = 4;         // that certainly fit a multiprocessor; more would cost spills
constexpr int kDocuments = kWarp;  // per block: a warp takes a query of the finished scores
constexpr int kMaxQueries = 64;
constexpr int kChunks = 4;  // of kWarp entries of a document, loaded together
constexpr int kHits = 4;    // table rows, loaded together

struct Entries {
  const int32_t* indices;  // (rows, width); null: dense
  const int32_t* lengths;
  int64_t rows, width, num_cols;
};

__device__ inline unsigned row_length(const Entries& entries, int64_t row) {
  return static_cast<unsigned>(min(max(entries.lengths[row], 0), static_cast<int32_t>(entries.width)));
}

__device__ inline bool is_inside(int32_t column, const Entries& entries) {
  return column >= 0 && column < entries.num_cols;
}

// The columns that a query of the block has: a bit each, and one behind the last for what is outside.
__device__ inline void set_used(unsigned* used, int64_t column) { atomicOr(used + column / 32, 1u << column % 32); }

// A thread per element of the dense queries [first, first + count).
template <typename Query, typename Acc>
__global__ void __launch_bounds__(kThreads)
    dense_table_kernel(const Entries queries, const Query* values, int64_t first, int64_t count, int lanes, Acc* table,
                       unsigned* used) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= count * queries.width) return;
  const Acc value = static_cast<Acc>(to_acc(values[first * queries.width + element]));
  if (value == Acc(0)) return;
  const int64_t column = element % queries.width;
  table[column * lanes + element / queries.width] = value;
  set_used(used, column);
}

// A block per sparse query. A column may come more than once: one warp has all entries of a column, and adds them in
// their order.
template <typename Query, typename Acc>
__global__ void __launch_bounds__(kThreads) sparse_table_kernel(const Entries queries, const Query* values,
                                                                int64_t first, int lanes, Acc* table, unsigned* used) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row = (first + blockIdx.x) * queries.width;
  const unsigned length = row_length(queries, first + blockIdx.x);
  for (unsigned start = 0; start < length; start += kWarp) {
    int32_t column = -1;
    Acc value = Acc(0);
    if (start + lane < length) {
      column = queries.indices[row + start + lane];
      value = static_cast<Acc>(to_acc(values[row + start + lane]));
    }
    const bool is_own = is_inside(column, queries) && column % kWarps == warp;
    const unsigned peers = __match_any_sync(kAllLanes, is_own ? column : -1);
    const int rank = __popc(peers & ((1u << lane) - 1));
    for (int turn = 0; __any_sync(kAllLanes, is_own && rank >= turn); ++turn) {
      if (is_own && rank == turn) {
        table[static_cast<int64_t>(column) * lanes + blockIdx.x] += value;
        set_used(used, column);
      }
      __syncwarp();
    }
  }
}

// Adds value x table row for the entries of the lanes in `hits`, in the order of the lanes.
template <typename Acc, int kPerLane>
__device__ void add_hits(unsigned hits, int32_t column, Acc value, const Acc* table, Acc (&sum)[kPerLane]) {
  const int lane = threadIdx.x % kWarp;
  int source = 0;
  while (hits != 0) {
    Acc factor[kHits], row[kHits][kPerLane];
    bool is_hit[kHits];
#pragma unroll
    for (int h = 0; h < kHits; ++h, hits &= hits - 1) {
      // Behind the last hit its row again, so that all loads are unconditional and in flight together.
      is_hit[h] = hits != 0;
      source = is_hit[h] ? __ffs(static_cast<int>(hits)) - 1 : source;
      factor[h] = __shfl_sync(kAllLanes, value, source);
      const int64_t first = static_cast<int64_t>(__shfl_sync(kAllLanes, column, source)) * (kWarp * kPerLane) + lane;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) row[h][i] = table[first + i * kWarp];
    }
#pragma unroll
    for (int h = 0; h < kHits; ++h) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (is_hit[h]) sum[i] += factor[h] * row[h][i];
      }
    }
  }
}

// The scores of a document: lane l has those of the queries l, l + kWarp, ...
template <typename T, int kPerLane>
__device__ void score_document(const Entries& documents, const T* values, int64_t n, const Accumulator<T>* table,
                               const unsigned* used, Accumulator<T> (&sum)[kPerLane]) {
  using Acc = Accumulator<T>;
  const int lane = threadIdx.x % kWarp;
  const unsigned length = row_length(documents, n);
  const int32_t* columns = documents.indices + n * documents.width;
  values += n * documents.width;
  for (unsigned start = 0; start < length; start += kChunks * kWarp) {
    int32_t column[kChunks];
    Acc value[kChunks];
    unsigned is_hit[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      // Behind the end the last entry again, so that all loads are unconditional and in flight together.
      const unsigned entry = min(start + c * kWarp + lane, length - 1);
      column[c] = columns[entry];
      value[c] = to_acc(values[entry]);
    }
    // Without branches, for the loads to be in flight together.
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const bool is_column = is_inside(column[c], documents);
      const int64_t known = is_column ? column[c] : documents.num_cols;
      is_hit[c] = used[known / 32] >> known % 32;
      // inf or NaN times the 0 of another query would not be 0.
      is_hit[c] |= static_cast<unsigned>(is_column) & static_cast<unsigned>(!isfinite(value[c]));
      is_hit[c] &= static_cast<unsigned>(start + c * kWarp + lane < length);
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      add_hits(__ballot_sync(kAllLanes, is_hit[c]), column[c], value[c], table, sum);
    }
  }
}

// Calls use(q, n, is_document, score) for query q and document n of the kDocuments documents of a block, by whole
// warps: n differs from lane to lane, and q does not.
template <typename T, int kPerLane, typename Use>
__global__ void __launch_bounds__(kThreads, kBlocks)
    score_kernel(const Entries documents, const T* values, const Accumulator<T>* table, const unsigned* used, int count,
                 const Use use) {
  using Acc = Accumulator<T>;
  __shared__ Acc tile[kWarp * kPerLane][kDocuments + 1];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kDocuments;
  for (int d = warp; d < kDocuments; d += kWarps) {
    Acc sum[kPerLane] = {};
    if (first + d < documents.rows) score_document(documents, values, first + d, table, used, sum);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) tile[i * kWarp + lane][d] = sum[i];
  }
  __syncthreads();
  for (int q = warp; q < count; q += kWarps) use(q, first + lane, first + lane < documents.rows, tile[q][lane]);
}

// Host -----------------------------------------------------------------------------------------------------------

// Queries as tensors whose memory the kernels read.
class Queries {
 public:
  explicit Queries(const SparseOperands& operands)
      : indices_(contiguous_or_none(operands.query_indices)),
        lengths_(contiguous_or_none(operands.query_lengths)),
        values_(as_contiguous(operands.query_values)),
        entries_{indices_ ? const_data<int32_t>(*indices_) : nullptr,
                 lengths_ ? const_data<int32_t>(*lengths_) : nullptr, values_.size(0), values_.size(1),
                 operands.num_cols} {}

  const Entries& entries() const { return entries_; }
  const Tensor& values() const { return values_; }

 private:
  std::optional<Tensor> indices_, lengths_;
  Tensor values_;
  Entries entries_;
};

// Documents, likewise. With float64 queries they are read as float64, else in their own type.
class Documents {
 public:
  Documents(const Tensor& indices, const Tensor& values, const Tensor& lengths, int64_t num_cols, ScalarType result)
      : indices_(as_contiguous(indices)),
        lengths_(as_contiguous(lengths)),
        values_(contiguous_as(values, result == ScalarType::Double ? result : values.scalar_type())),
        entries_{const_data<int32_t>(indices_), const_data<int32_t>(lengths_), values.size(0), values.size(1),
                 num_cols} {}

  // Some of the documents.
  Entries rows(int64_t first, int64_t count) const {
    return {entries_.indices + first * entries_.width, entries_.lengths + first, count, entries_.width,
            entries_.num_cols};
  }
  int64_t count() const { return entries_.rows; }
  const Tensor& values() const { return values_; }

 private:
  Tensor indices_, lengths_, values_;
  Entries entries_;
};

// The table of a block of queries, from `first` on.
template <typename Acc>
class QueryTable {
 public:
  QueryTable(const Queries& queries, int64_t first, const OnDevice& device)
      : count_(static_cast<int>(std::min<int64_t>(queries.entries().rows - first, kMaxQueries))),
        lanes_(count_ > kWarp ? 2 * kWarp : kWarp),
        table_(new_zeros_tensor(queries.values(), std::vector<int64_t>{queries.entries().num_cols, lanes_},
                                std::is_same_v<Acc, double> ? ScalarType::Double : ScalarType::Float)),
        used_(new_zeros_tensor(queries.values(), std::vector<int64_t>{queries.entries().num_cols / 32 + 1},
                               ScalarType::Int)),
        device_(device) {
    if (queries.entries().width == 0) return;
    dispatch_floating(queries.values().scalar_type(), [&](auto type) {
      fill(queries.entries(), const_data<typename decltype(type)::type>(queries.values()), first);
    });
  }

  int count() const { return count_; }

  // Calls use(...) for all scores of these documents, on the device: see score_kernel.
  template <typename T, typename Use>
  void score(const Entries& documents, const T* values, const Use& use) const {
    static_assert(std::is_same_v<Acc, Accumulator<T>>);
    const unsigned blocks = grid_size(ceil_div(documents.rows, kDocuments));
    if (lanes_ == kWarp) {
      score_kernel<T, 1, Use>
          <<<blocks, kThreads, 0, device_.stream()>>>(documents, values, const_data<Acc>(table_), used(), count_, use);
    } else {
      score_kernel<T, 2, Use>
          <<<blocks, kThreads, 0, device_.stream()>>>(documents, values, const_data<Acc>(table_), used(), count_, use);
    }
  }

 private:
  unsigned* used() const { return reinterpret_cast<unsigned*>(mutable_data<int32_t>(used_)); }

  template <typename Query>
  void fill(const Entries& queries, const Query* values, int64_t first) {
    if (queries.indices == nullptr) {
      const unsigned blocks = grid_size(ceil_div(count_ * queries.width, kThreads));
      dense_table_kernel<Query, Acc><<<blocks, kThreads, 0, device_.stream()>>>(queries, values, first, count_, lanes_,
                                                                                mutable_data<Acc>(table_), used());
    } else {
      sparse_table_kernel<Query, Acc><<<grid_size(count_), kThreads, 0, device_.stream()>>>(
          queries, values, first, lanes_, mutable_data<Acc>(table_), used());
    }
  }

  int count_, lanes_;
  Tensor table_, used_;
  const OnDevice& device_;
};

}  // namespace splade_fast::cuda::score
