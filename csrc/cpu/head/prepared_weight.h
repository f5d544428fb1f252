// The decoder's weight as the int8 product wants it, and checks of what belongs to it.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "common/screen_bound.h"
#include "cpu/head/head.h"

namespace splade_fast::cpu {

// The decoder's weight as the int8 product wants it.
struct PreparedWeight {
  Tensor mean;    // (D,) float: about the mean of the hidden states, taken from them before they are rounded
  Tensor packed;  // (panels, steps, columns) int32, four int8 each
  Tensor rows;    // (panels, kRows or with a basis kBasisRows, columns) float
  std::optional<Tensor> basis;  // (2, D, padded D) float: what tokens, and what entries are multiplied by, instead of
                                // being rotated: products stay what they are, their first depths tell most of them
  std::optional<Tensor> order;  // with a basis (V,) int32: the entry of every column; entries alike are side by side

  // kRest: of every stage but the last, the norm of what it leaves.
  enum Row { kScale, kResidual, kNorm, kMeanDot, kRest };
  static constexpr int64_t kRows = kRest, kBasisRows = kRest + kScreenStages - 1;
  const float* row(int64_t panel, int64_t which) const {
    return const_data<float>(rows) + (panel * rows.size(1) + which) * rows.size(2);
  }
  float* mutable_row(int64_t panel, int64_t which) const { return const_cast<float*>(row(panel, which)); }
  uint32_t* units(int64_t panel) const {
    return reinterpret_cast<uint32_t*>(mutable_data<int32_t>(packed)) + panel * packed.size(1) * packed.size(2);
  }
};

// Random signs, times the norm of the Hadamard transform.
inline std::vector<float> rotation_signs(int64_t padded_depth) {
  std::vector<float> sign(padded_depth);
  const float norm = 1.0f / std::sqrt(static_cast<float>(screen_block(padded_depth)));
  for (int64_t d = 0; d < padded_depth; ++d) sign[d] = screen_sign(d) * norm;
  return sign;
}

inline void check_mean(const Tensor& mean, const Tensor& weight) {
  STD_TORCH_CHECK(mean.scalar_type() == ScalarType::Float && mean.dim() == 1 && mean.size(0) == weight.size(1),
                  "mean must be float32 (", weight.size(1), ",)");
}

inline void check_basis(const std::optional<Tensor>& basis, const std::optional<Tensor>& order, const Tensor& weight) {
  STD_TORCH_CHECK(basis.has_value() == order.has_value(), "basis and order must be given together");
  if (!basis) return;
  STD_TORCH_CHECK(basis->scalar_type() == ScalarType::Float && basis->dim() == 3 && basis->size(0) == 2 &&
                      basis->size(1) == weight.size(1) && basis->size(2) == screen_padded_dim(weight.size(1)),
                  "basis must be float32 (2, ", weight.size(1), ", ", screen_padded_dim(weight.size(1)), ")");
  STD_TORCH_CHECK(order->scalar_type() == ScalarType::Int && order->dim() == 1 && order->size(0) == weight.size(0),
                  "order must be int32 (", weight.size(0), ",)");
}

// The entry of every column.
inline std::vector<int64_t> entries_in_order(const std::optional<Tensor>& order, int64_t vocabulary) {
  std::vector<int64_t> entries(vocabulary);
  const int32_t* given = order ? const_data<int32_t>(*order) : nullptr;
  for (int64_t column = 0; column < vocabulary; ++column) {
    entries[column] = given ? given[column] : column;
    STD_TORCH_CHECK(entries[column] >= 0 && entries[column] < vocabulary, "order must have the entries of weight, got ",
                    entries[column]);
  }
  return entries;
}

// Of a vector or a matrix, an upper bound.
inline float norm_of(const float* data, int64_t count) {
  double squares = 0;
  for (int64_t i = 0; i < count; ++i) squares += static_cast<double>(data[i]) * data[i];
  return static_cast<float>(std::sqrt(squares)) * (1.0f + 0x1p-10f);
}
inline float norm_of_basis(const Tensor& basis, int64_t which) {
  const int64_t count = basis.size(1) * basis.size(2);
  return norm_of(const_data<float>(basis) + which * count, count);
}

}  // namespace splade_fast::cpu
