// head_prepare on the CPU: the decoder's weight in int8, for the screened head.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "rounded.h"

namespace splade_fast::cpu {
namespace {

std::tuple<Tensor, Tensor> prepare(const Tensor& weight, const Tensor& mean) {
  check_floating("weight", weight, 2);
  check_mean(mean, weight);
  const Screen& kernel = screen();
  const int64_t vocabulary = weight.size(0), depth = weight.size(1), columns = kernel.panel_columns;
  STD_TORCH_CHECK(depth <= kScreenMaxDepth, "weight must have at most ", kScreenMaxDepth, " columns, got ", depth);
  const int64_t panels = (vocabulary + columns - 1) / columns, padded_depth = screen_padded_depth(depth);
  const Tensor dense = as_contiguous(weight), dense_mean = as_contiguous(mean);
  const PreparedWeight prepared{
      dense_mean, new_tensor(mean, std::vector<int64_t>{panels, padded_depth / 4, columns}, ScalarType::Int),
      new_tensor(mean, std::vector<int64_t>{panels, 4, columns})};
  const std::vector<float> sign = rotation_signs(padded_depth);
  dispatch_floating(weight.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      const Scratch<float> scratch(padded_depth * kMaxLanes);
      int32_t sum[kMaxLanes];
      for (int64_t panel = begin; panel < end; ++panel) {
        for (int64_t lane = 0; lane < columns; lane += kernel.lanes) {
          // Columns past the vocabulary repeat its last entry.
          const int64_t first = std::min(panel * columns + lane, vocabulary - 1);
          round_rows<T>(kernel)(
              {const_data<T>(dense) + first * depth, depth, nullptr, vocabulary - first, depth, padded_depth,
               const_data<float>(dense_mean), sign.data(), false, scratch.get()},
              kernel.weight_levels, kernel.weight_offset,
              {prepared.units(panel) + lane, columns, prepared.mutable_row(panel, PreparedWeight::kScale) + lane,
               prepared.mutable_row(panel, PreparedWeight::kResidual) + lane,
               prepared.mutable_row(panel, PreparedWeight::kNorm) + lane, sum,
               prepared.mutable_row(panel, PreparedWeight::kMeanDot) + lane});
        }
        float* residual = prepared.mutable_row(panel, PreparedWeight::kResidual);
        for (int64_t column = 0; column < columns; ++column) residual[column] += kScreenTiny;
      }
    });
  });
  return {prepared.packed, prepared.rows};
}

}  // namespace
}  // namespace splade_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CPU, m) { m.impl("head_prepare", TORCH_BOX(&splade_fast::cpu::prepare)); }
