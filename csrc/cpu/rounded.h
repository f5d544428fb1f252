// Both sides of the int8 product, rounded and packed: the decoder's weight, once per version, and the tokens of a call.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/screen_bound.h"
#include "head.h"
#include "kernels.h"
#include "memory.h"
#include "screen.h"

namespace splade_fast::cpu {

// The decoder's weight as the int8 product wants it.
struct PreparedWeight {
  Tensor mean;    // (D,) float: about the mean of the hidden states, taken from them before they are rounded
  Tensor packed;  // (panels, steps, columns) int32, four int8 each
  Tensor rows;    // (panels, 4, columns) float: scale, residual, norm, product with the mean

  enum Row { kScale, kResidual, kNorm, kMeanDot };
  const float* row(int64_t panel, Row which) const {
    const int64_t columns = rows.size(2);
    return const_data<float>(rows) + (panel * 4 + which) * columns;
  }
  float* mutable_row(int64_t panel, Row which) const { return const_cast<float*>(row(panel, which)); }
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

// The rounded tokens of sequences [first, last).
template <typename T>
class RoundedTokens {
 public:
  RoundedTokens(const HeadInput& input, const PreparedWeight& weight, const std::vector<float>& sign, int64_t first,
                int64_t last)
      : first_(first),
        begin_(input.sequences.offset[first]),
        count_(input.sequences.offset[last] - begin_),
        padded_((count_ + kScreenGroup - 1) / kScreenGroup * kScreenGroup),
        steps_(static_cast<int64_t>(sign.size()) / 4),
        units_(padded_ * steps_),
        scale_(padded_),
        residual_(padded_),
        norm_(padded_),
        start_(padded_),
        sequence_(count_),
        largest_residual_(last - first),
        largest_norm_(last - first) {
    for (int64_t t = 0; t < count_; ++t) {
      sequence_[t] = input.sequences.sequence[begin_ + t] - static_cast<int32_t>(first);
    }
    const Screen& kernel = screen();
    const float rounding = screen_rounding(input.depth());
    const float mean_norm = norm_of(weight.mean);
    torch::stable::parallel_for(0, padded_ / kernel.lanes, 4, [&](int64_t begin, int64_t end) {
      const Scratch<float> scratch(4 * steps_ * kMaxLanes);
      for (int64_t lane = begin * kernel.lanes; lane < end * kernel.lanes; lane += kernel.lanes) {
        // Lanes past the last token repeat it; nothing reads them.
        const int64_t token = std::min(lane, count_ - 1);
        uint32_t* units = units_.get() + lane / kScreenGroup * kScreenGroup * steps_ + lane % kScreenGroup;
        round_rows<T>(kernel)(
            {const_data<T>(input.hidden), input.depth(), input.sequences.row.data() + begin_ + token, count_ - token,
             input.depth(), 4 * steps_, const_data<float>(weight.mean), sign.data(), true, scratch.get()},
            kernel.token_levels, 0,
            {units, kernel.token_rows ? 0 : kScreenGroup, scale_.get() + lane, residual_.get() + lane,
             norm_.get() + lane, start_.get() + lane, nullptr});
        for (int64_t t = lane; t < lane + kernel.lanes; ++t) {
          start_.get()[t] *= -static_cast<int32_t>(kernel.weight_offset);
          residual_.get()[t] += rounding * (norm_.get()[t] + mean_norm) + kScreenTiny;
        }
      }
    });
    for (int64_t t = 0; t < count_; ++t) {
      float &residual = largest_residual_[sequence_[t]], &norm = largest_norm_[sequence_[t]];
      residual = std::max(residual, residual_.get()[t]);
      norm = std::max(norm, norm_.get()[t]);
    }
  }

  ScreenTokens view() const {
    return {units_.get(), scale_.get(), residual_.get(), norm_.get(), start_.get(), sequence_.data(), steps_};
  }
  int64_t count() const { return count_; }
  // Of all tokens of a sequence.
  float largest_residual(int64_t sequence) const { return largest_residual_[sequence - first_]; }
  float largest_norm(int64_t sequence) const { return largest_norm_[sequence - first_]; }

 private:
  static float norm_of(const Tensor& mean) {
    double squares = 0;
    for (int64_t d = 0; d < mean.numel(); ++d) squares += std::pow(const_data<float>(mean)[d], 2);
    return static_cast<float>(std::sqrt(squares)) * screen_inflation(mean.numel());
  }

  const int64_t first_, begin_, count_, padded_, steps_;
  const Scratch<uint32_t> units_;
  const Scratch<float> scale_, residual_, norm_;
  const Scratch<int32_t> start_;
  std::vector<int32_t> sequence_;
  std::vector<float> largest_residual_, largest_norm_;
};

}  // namespace splade_fast::cpu
