// score on CUDA: sparse rows x sparse rows -> (Q, N).
//
// Queries go in blocks of kMaxQueries. A block becomes a dense table (num_cols, lanes) that stays in the second-level
// cache, and flags of the columns that any of its queries has. A warp takes a document: its lanes read entries and look
// up the flags, and each hit adds value x table row, a query or two per lane. The sum of a pair runs over
// ascending columns only, so it does not depend on the block or the grid. Entries outside the columns are skipped:
// reporting them would need to wait for the device.
#include <torch/csrc/stable/library.h>

#include "cuda/score.h"
#include "cuda/warp.cuh"

namespace splade_fast::cuda {
namespace {

constexpr int kWarps = 8;  // of a block
constexpr int kThreads = kWarps * kWarp;
constexpr int kDocuments = kWarp;  // per block: a warp writes a row of the result
constexpr int kMaxQueries = 64;

struct Entries {
  const int32_t* indices;  // (rows, width); null: dense
  const int32_t* lengths;
  int64_t rows, width, num_cols;
};

__device__ inline int32_t row_length(const Entries& entries, int64_t row) {
  return min(max(entries.lengths[row], 0), static_cast<int32_t>(entries.width));
}

__device__ inline bool is_inside(int32_t column, const Entries& entries) {
  return column >= 0 && column < entries.num_cols;
}

// A thread per element of the dense queries [first, first + count).
template <typename Query, typename Acc>
__global__ void __launch_bounds__(kThreads)
    dense_table_kernel(const Entries queries, const Query* values, int64_t first, int64_t count, int lanes, Acc* table,
                       uint8_t* used) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= count * queries.width) return;
  const Acc value = static_cast<Acc>(to_acc(values[first * queries.width + element]));
  if (value == Acc(0)) return;
  const int64_t column = element % queries.width;
  table[column * lanes + element / queries.width] = value;
  used[column] = 1;
}

// A block per sparse query. A column may come more than once: one warp has all entries of a column, and adds them in
// their order.
template <typename Query, typename Acc>
__global__ void __launch_bounds__(kThreads) sparse_table_kernel(const Entries queries, const Query* values,
                                                                int64_t first, int lanes, Acc* table, uint8_t* used) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row = (first + blockIdx.x) * queries.width;
  const int32_t length = row_length(queries, first + blockIdx.x);
  for (int32_t start = 0; start < length; start += kWarp) {
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
        used[column] = 1;
      }
      __syncwarp();
    }
  }
}

template <typename T, typename Result, int kPerLane>
__global__ void __launch_bounds__(kThreads)
    score_kernel(const Entries documents, const T* values, const Accumulator<T>* table, const uint8_t* used, int count,
                 Result* scores) {
  using Acc = Accumulator<T>;
  constexpr int kLanes = kWarp * kPerLane;
  __shared__ Acc tile[kLanes][kDocuments + 1];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kDocuments;
  for (int d = warp; d < kDocuments; d += kWarps) {
    const int64_t n = first + d;
    Acc sum[kPerLane] = {};
    const int32_t length = n < documents.rows ? row_length(documents, n) : 0;
    for (int32_t start = 0; start < length; start += kWarp) {
      int32_t column = 0;
      Acc value = Acc(0);
      bool is_hit = false;
      if (start + lane < length) {
        const int64_t place = n * documents.width + start + lane;
        column = documents.indices[place];
        value = to_acc(values[place]);
        // inf or NaN times the 0 of another query would not be 0.
        is_hit = is_inside(column, documents) && (used[column] != 0 || !isfinite(value));
      }
      for (unsigned hits = __ballot_sync(kAllLanes, is_hit); hits != 0; hits &= hits - 1) {
        const int source = __ffs(static_cast<int>(hits)) - 1;
        const Acc factor = __shfl_sync(kAllLanes, value, source);
        const Acc* row = table + static_cast<int64_t>(__shfl_sync(kAllLanes, column, source)) * kLanes + lane;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) sum[i] += factor * row[i * kWarp];
      }
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) tile[i * kWarp + lane][d] = sum[i];
  }
  __syncthreads();
  if (first + lane >= documents.rows) return;
  for (int q = warp; q < count; q += kWarps) {
    scores[q * documents.rows + first + lane] = from_acc<Result>(tile[q][lane]);
  }
}

// The scores of one block of queries, from `first` on.
template <typename Query, typename T, typename Result>
void score_block(const Entries& queries, const Query* query_values, int64_t first, const Entries& documents,
                 const T* doc_values, const Tensor& like, Result* scores, const OnDevice& device) {
  using Acc = Accumulator<T>;
  const int64_t count = std::min<int64_t>(queries.rows - first, kMaxQueries);
  const int lanes = count > kWarp ? 2 * kWarp : kWarp;
  const ScalarType acc = std::is_same_v<Acc, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor table = new_zeros_tensor(like, std::vector<int64_t>{documents.num_cols, lanes}, acc);
  const Tensor used = new_zeros_tensor(like, std::vector<int64_t>{documents.num_cols}, ScalarType::Byte);
  if (queries.width > 0) {
    if (queries.indices == nullptr) {
      const unsigned blocks = grid_size(ceil_div(count * queries.width, kThreads));
      dense_table_kernel<Query, Acc><<<blocks, kThreads, 0, device.stream()>>>(
          queries, query_values, first, count, lanes, mutable_data<Acc>(table), mutable_data<uint8_t>(used));
    } else {
      sparse_table_kernel<Query, Acc><<<grid_size(count), kThreads, 0, device.stream()>>>(
          queries, query_values, first, lanes, mutable_data<Acc>(table), mutable_data<uint8_t>(used));
    }
  }
  const auto launch = [&](auto per_lane) {
    score_kernel<T, Result, decltype(per_lane)::value>
        <<<grid_size(ceil_div(documents.rows, kDocuments)), kThreads, 0, device.stream()>>>(
            documents, doc_values, const_data<Acc>(table), const_data<uint8_t>(used), static_cast<int>(count),
            scores + first * documents.rows);
  };
  if (lanes == kWarp) {
    launch(Constant<1>{});
  } else {
    launch(Constant<2>{});
  }
}

// Host functions -------------------------------------------------------------------------------------------------

}  // namespace

Tensor sparse_products(const SparseOperands& operands, ScalarType result, const OnDevice& device) {
  const auto& [query_indices, query_values, query_lengths, doc_indices, doc_values, doc_lengths, num_cols] = operands;
  STD_TORCH_CHECK(query_values.size(1) <= INT32_MAX && doc_values.size(1) <= INT32_MAX,
                  "query_values and doc_values must have fewer than 2^31 slots");
  const Tensor scores =
      new_tensor(query_values, std::vector<int64_t>{query_values.size(0), doc_values.size(0)}, result);
  if (scores.numel() == 0) return scores;
  const std::optional<Tensor> query_columns = contiguous_or_none(query_indices);
  const std::optional<Tensor> query_sizes = contiguous_or_none(query_lengths);
  const Tensor query_entries = as_contiguous(query_values);
  const Tensor columns = as_contiguous(doc_indices), sizes = as_contiguous(doc_lengths);
  // With float64 queries documents are read as float64, else in their own type.
  const Tensor entries = contiguous_as(doc_values, result == ScalarType::Double ? result : doc_values.scalar_type());
  const Entries queries{query_columns ? const_data<int32_t>(*query_columns) : nullptr,
                        query_sizes ? const_data<int32_t>(*query_sizes) : nullptr, query_values.size(0),
                        query_values.size(1), num_cols};
  const Entries documents{const_data<int32_t>(columns), const_data<int32_t>(sizes), doc_values.size(0),
                          doc_values.size(1), num_cols};
  dispatch_floating(entries.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = Accumulator<T>;
    dispatch_floating(query_entries.scalar_type(), [&](auto query_type) {
      using Query = typename decltype(query_type)::type;
      for (int64_t first = 0; first < queries.rows; first += kMaxQueries) {
        // The wider of the two types is the type of the documents or the accumulation type.
        if (result == entries.scalar_type()) {
          score_block(queries, const_data<Query>(query_entries), first, documents, const_data<T>(entries), entries,
                      mutable_data<T>(scores), device);
        } else {
          score_block(queries, const_data<Query>(query_entries), first, documents, const_data<T>(entries), entries,
                      mutable_data<Acc>(scores), device);
        }
      }
    });
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
