// Scores of sparse rows, for the score and sample ops.
#pragma once

#include "cuda/common.cuh"

namespace splade_fast::cuda {

struct SparseOperands {
  std::optional<Tensor> query_indices;
  Tensor query_values;
  std::optional<Tensor> query_lengths;
  Tensor doc_indices, doc_values, doc_lengths;
  int64_t num_cols;
};

inline void check_widths(const SparseOperands& operands) {
  STD_TORCH_CHECK(operands.query_values.size(1) <= INT32_MAX && operands.doc_values.size(1) <= INT32_MAX,
                  "query_values and doc_values must have fewer than 2^31 slots");
}

// (Q, N) in the wider type of the two, or in its accumulation type.
// The caller has checked the operands and checks the launches.
Tensor sparse_products(const SparseOperands& operands, ScalarType result, const OnDevice& device);

}  // namespace splade_fast::cuda
