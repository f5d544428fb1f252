// The weight as the int8 product reads it, and checks of the tensors that belong to it.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include "common/screen_bound.h"
#include "cpu/head/head.h"

namespace splade_fast::cpu {

struct PreparedWeight {
  Tensor mean;    // (D,) float: about the mean of the hidden states, which is subtracted from them before rounding
  Tensor packed;  // (panels, steps, columns) int32, each of four int8
  Tensor rows;    // (panels, kRows, columns) float, or kBasisRows with a basis
  // (2, D, padded D) float: two matrices by which tokens and rows of the weight are multiplied instead of being
  // rotated. Dot products stay the same, and their first dimensions carry most of them.
  std::optional<Tensor> basis;
  // (V,) int32, with a basis: the vocabulary entry of each column. Similar entries are neighbours.
  std::optional<Tensor> order;

  // kRest has a row for each stage but the last: the norm of the dimensions after that stage.
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

// Random signs, scaled so that the Hadamard transform keeps norms.
inline std::vector<float> rotation_signs(int64_t padded_dim) {
  std::vector<float> sign(padded_dim);
  const float norm = 1.0f / std::sqrt(static_cast<float>(screen_block(padded_dim)));
  for (int64_t d = 0; d < padded_dim; ++d) sign[d] = screen_sign(d) * norm;
  return sign;
}

inline void check_mean(const Tensor& mean, const Tensor& weight) {
  STD_TORCH_CHECK(mean.scalar_type() == ScalarType::Float && mean.dim() == 1 && mean.size(0) == weight.size(1),
                  "mean must be float32 (", weight.size(1), ",), got ", describe(mean));
}

inline void check_basis(const std::optional<Tensor>& basis, const std::optional<Tensor>& order, const Tensor& weight) {
  STD_TORCH_CHECK(basis.has_value() == order.has_value(), "basis and order must both be None or neither");
  if (!basis) return;
  STD_TORCH_CHECK(basis->scalar_type() == ScalarType::Float && basis->dim() == 3 && basis->size(0) == 2 &&
                      basis->size(1) == weight.size(1) && basis->size(2) == screen_padded_dim(weight.size(1)),
                  "basis must be float32 (2, ", weight.size(1), ", ", screen_padded_dim(weight.size(1)), "), got ",
                  describe(*basis));
  STD_TORCH_CHECK(order->scalar_type() == ScalarType::Int && order->dim() == 1 && order->size(0) == weight.size(0),
                  "order must be int32 (", weight.size(0), ",), got ", describe(*order));
}

// Vocabulary entry of each column.
class ColumnEntries {
 public:
  ColumnEntries(const std::optional<Tensor>& order, int64_t vocabulary)
      : given_(order ? const_data<int32_t>(*order) : nullptr) {
    if (!given_) return;
    uint32_t largest = 0;  // a negative entry is a large one
    for (int64_t column = 0; column < vocabulary; ++column) {
      largest = std::max(largest, static_cast<uint32_t>(given_[column]));
    }
    STD_TORCH_CHECK(largest < vocabulary || vocabulary == 0, "order must be between 0 and ", vocabulary - 1, ", got ",
                    static_cast<int32_t>(largest));
  }
  int64_t operator[](int64_t column) const { return given_ ? given_[column] : column; }

 private:
  const int32_t* given_;  // null: the columns themselves
};

// Upper bound of the Frobenius norm.
inline float frobenius_bound(const float* data, int64_t count) {
  constexpr int64_t kSums = 8;  // independent, so that no addition waits for the last one
  double squares[kSums] = {};
  for (int64_t i = 0; i < count; ++i) squares[i % kSums] += static_cast<double>(data[i]) * data[i];
  return static_cast<float>(std::sqrt(std::accumulate(squares, squares + kSums, 0.0))) * (1.0f + 0x1p-10f);
}
inline float basis_norm_bound(const Tensor& basis, int64_t which) {
  const int64_t count = basis.size(1) * basis.size(2);
  return frobenius_bound(const_data<float>(basis) + which * count, count);
}

}  // namespace splade_fast::cpu
