// head_prepare on the CPU: rounds the weight to int8 for the screened head.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "cpu/head/prepared_weight.h"
#include "cpu/memory.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/screen.h"

namespace splade_fast::cpu {
namespace {

// Sizes of packed and rows.
struct Shapes {
  std::vector<int64_t> packed, rows;
};

Shapes check_and_find_shapes(const Tensor& weight, const Tensor& mean, const std::optional<Tensor>& basis,
                             const std::optional<Tensor>& order) {
  check_floating("weight", weight, 2);
  check_mean(mean, weight);
  const int64_t dim = weight.size(1), columns = screen().panel_columns;
  STD_TORCH_CHECK(dim <= kScreenMaxDim, "weight must have at most ", kScreenMaxDim, " columns, got ", dim);
  check_basis(basis, order, weight);
  const int64_t panels = ceil_div(weight.size(0), columns);
  return {{panels, screen_padded_dim(dim) / 4, columns},
          {panels, basis ? PreparedWeight::kBasisRows : PreparedWeight::kRows, columns}};
}

// Write prepared.packed and prepared.rows.
void round_weight(const Tensor& weight, const PreparedWeight& prepared, double basis_error) {
  const Screen& kernel = screen();
  const std::optional<Tensor>& basis = prepared.basis;
  const int64_t vocabulary = weight.size(0), dim = weight.size(1), columns = kernel.panel_columns;
  const int64_t panels = prepared.packed.size(0), padded_dim = screen_padded_dim(dim);
  const Tensor dense = as_contiguous(weight);
  const ColumnEntries entry_of_column(prepared.order, vocabulary);
  const std::vector<float> sign = rotation_signs(padded_dim);
  const float* entries_basis = basis ? const_data<float>(*basis) + dim * padded_dim : nullptr;
  const float rounding = screen_rounding(dim);
  // Rounding error of the change of basis, relative to the norm of a row of the weight.
  const float basis_rounding =
      basis ? screen_basis_rounding(dim) * basis_norm_bound(*basis, 1) + 1.001f * static_cast<float>(basis_error)
            : 0.0f;
  dispatch_floating(weight.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      const Scratch<float> scratch(2 * padded_dim * kMaxLanes);
      int64_t entries[kMaxLanes];
      int32_t sum[kScreenStages][kMaxLanes];
      float own_norm[kMaxLanes], rest[kScreenStages - 1][kMaxLanes];
      for (int64_t panel = begin; panel < end; ++panel) {
        for (int64_t lane = 0; lane < columns; lane += kernel.lanes) {
          // Columns past the vocabulary repeat the last entry.
          for (int64_t i = 0; i < kernel.lanes; ++i) {
            entries[i] = entry_of_column[std::min(panel * columns + lane + i, vocabulary - 1)];
          }
          float* residual = prepared.mutable_row(panel, PreparedWeight::kResidual) + lane;
          float* norm = prepared.mutable_row(panel, PreparedWeight::kNorm) + lane;
          row_functions<T>(kernel).round(
              {const_data<T>(dense), dim, entries, kernel.lanes, dim, padded_dim, scratch.get(),
               const_data<float>(prepared.mean), false, sign.data(), entries_basis, nullptr},
              kernel.weight_levels, kernel.weight_offset,
              {prepared.units(panel) + lane,
               columns,
               prepared.mutable_row(panel, PreparedWeight::kScale) + lane,
               residual,
               norm,
               own_norm,
               {rest[0], rest[1]},
               {sum[0], sum[1], sum[2]},
               prepared.mutable_row(panel, PreparedWeight::kMeanDot) + lane});
          for (int64_t i = 0; i < kernel.lanes; ++i) {
            if (basis) {
              residual[i] += basis_rounding * own_norm[i] + rounding * (own_norm[i] + norm[i]);
              for (int64_t stage = 0; stage < kScreenStages - 1; ++stage) {
                prepared.mutable_row(panel, PreparedWeight::kRest + stage)[lane + i] = rest[stage][i];
              }
            }
            residual[i] += kScreenTiny;
          }
        }
      }
    });
  });
}

std::tuple<Tensor, Tensor> prepare(const Tensor& weight, const Tensor& mean, const std::optional<Tensor>& basis,
                                   const std::optional<Tensor>& order, double basis_error) {
  const Shapes shapes = check_and_find_shapes(weight, mean, basis, order);
  const PreparedWeight prepared{as_contiguous(mean), new_tensor(mean, shapes.packed, ScalarType::Int),
                                new_tensor(mean, shapes.rows), contiguous_or_none(basis), contiguous_or_none(order)};
  round_weight(weight, prepared, basis_error);
  return {prepared.packed, prepared.rows};
}

void check_target(const char* name, const Tensor& target, ScalarType dtype, const std::vector<int64_t>& shape) {
  bool fits = target.scalar_type() == dtype && target.is_contiguous() && target.dim() == 3;
  for (int64_t i = 0; fits && i < 3; ++i) fits = target.size(i) == shape[i];
  STD_TORCH_CHECK(fits, name, " must be what head_prepare made of a weight of this shape, got ", describe(target));
}

void prepare_into(const Tensor& weight, const Tensor& mean, const std::optional<Tensor>& basis,
                  const std::optional<Tensor>& order, double basis_error, const Tensor& packed, const Tensor& rows) {
  const Shapes shapes = check_and_find_shapes(weight, mean, basis, order);
  check_target("packed", packed, ScalarType::Int, shapes.packed);
  check_target("rows", rows, ScalarType::Float, shapes.rows);
  round_weight(weight, {as_contiguous(mean), packed, rows, contiguous_or_none(basis), contiguous_or_none(order)},
               basis_error);
}

}  // namespace
}  // namespace splade_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CPU, m) {
  m.impl("head_prepare", TORCH_BOX(&splade_fast::cpu::prepare));
  m.impl("head_prepare_into", TORCH_BOX(&splade_fast::cpu::prepare_into));
}
