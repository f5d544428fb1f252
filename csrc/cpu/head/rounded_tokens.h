// Tokens, rounded and packed for the int8 product.
#pragma once

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "cpu/head/prepared_weight.h"
#include "cpu/memory.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/screen.h"

namespace splade_fast::cpu {

// The rounded tokens of sequences [first, last).
template <typename T>
class RoundedTokens {
 public:
  RoundedTokens(const HeadInput& input, const PreparedWeight& weight, const std::vector<float>& sign, int64_t first,
                int64_t last)
      : input_(input),
        first_(first),
        begin_(input.sequences.offset[first]),
        count_(input.sequences.offset[last] - begin_),
        padded_(round_up(count_, kScreenGroup)),
        dim_(static_cast<int64_t>(sign.size())),
        units_(padded_ * dim_ / 4),
        scale_(padded_),
        residual_(padded_),
        norm_(padded_),
        correction_(kScreenStages * padded_),
        sequence_(count_),
        largest_residual_(last - first),
        largest_norm_(last - first) {
    for (int64_t t = 0; t < count_; ++t) {
      sequence_[t] = input.sequences.sequence[begin_ + t] - static_cast<int32_t>(first);
    }
    weight.basis ? round_along_basis(weight, last) : round_rotated(weight, sign);
    for (int64_t t = 0; t < count_; ++t) {
      float &residual = largest_residual_[sequence_[t]], &norm = largest_norm_[sequence_[t]];
      residual = std::max(residual, residual_.get()[t]);
      norm = std::max(norm, norm_.get()[t]);
    }
  }

  ScreenTokens view() const {
    return {units_.get(),
            scale_.get(),
            residual_.get(),
            norm_.get(),
            {correction(0), correction(1), correction(2)},
            sequence_.data(),
            dim_ / 4,
            tiles_.empty() ? 1 : kScreenStages,
            tiles_.data()};
  }
  int64_t count() const { return count_; }
  // Largest residual and norm of the tokens of a sequence.
  float largest_residual(int64_t sequence) const { return largest_residual_[sequence - first_]; }
  float largest_norm(int64_t sequence) const { return largest_norm_[sequence - first_]; }
  // Input token of rounded token i. The tokens of a sequence are neighbours, but may be in another order.
  int64_t token(int64_t i) const { return begin_ + (order_.empty() ? i : order_[i]); }
  bool is_in_input_order() const { return order_.empty(); }

 private:
  // Rotate the tokens by signs and Hadamard transforms, and round each with its own scale.
  void round_rotated(const PreparedWeight& weight, const std::vector<float>& sign) {
    const float rounding = screen_rounding(input_.dim());
    const float mean_norm = frobenius_bound(const_data<float>(weight.mean), weight.mean.numel());
    for_each_group([&](int64_t lane, float* scratch) {
      float own_norm[kMaxLanes], rest[kScreenStages - 1][kMaxLanes];
      row_functions<T>(screen()).round(hidden(lane, scratch, weight, sign.data(), nullptr), screen().token_levels, 0,
                                       rounded(lane, own_norm, {rest[0], rest[1]}));
      for (int64_t t = lane; t < lane + screen().lanes; ++t) {
        residual_.get()[t] += rounding * (norm_.get()[t] + mean_norm) + kScreenTiny;
        scale_correction(t);
        correction(0)[t] += correction(1)[t] + correction(2)[t];
      }
    });
  }

  // Multiply the tokens by the basis, and round all tokens of a tile with one scale. The tokens of a sequence are
  // sorted by the norm that remains after the first stage, so that the tokens of a tile are similar.
  void round_along_basis(const PreparedWeight& weight, int64_t last) {
    const Scratch<float> rows(padded_ * dim_), largest(padded_), own_norm(padded_), rest(padded_);
    for_each_group([&](int64_t lane, float* scratch) {
      row_functions<T>(screen()).rotate(
          hidden(lane, scratch, weight, nullptr, const_data<float>(*weight.basis)),
          {rows.get() + lane * dim_, largest.get() + lane, own_norm.get() + lane, rest.get() + lane});
    });
    sort_sequences(rest.get(), last);
    const Scratch<float> tile_largest(padded_), rests((kScreenStages - 1) * padded_);
    find_largest_of_tiles(largest.get(), tile_largest.get());
    const float basis_rounding = screen_basis_rounding(input_.dim()) * basis_norm_bound(*weight.basis, 0);
    const float mean_norm = frobenius_bound(const_data<float>(weight.mean), weight.mean.numel());
    for_each_group([&](int64_t lane, float* scratch) {
      const int64_t from = std::min(lane, count_ - 1);
      float unused[kMaxLanes];
      row_functions<float>(screen()).round({rows.get(), dim_, order_.data() + from, count_ - from, dim_, dim_, scratch,
                                            nullptr, true, nullptr, nullptr, tile_largest.get() + lane},
                                           screen().token_levels, 0,
                                           rounded(lane, unused, {rests.get() + lane, rests.get() + padded_ + lane}));
      for (int64_t t = lane; t < lane + screen().lanes; ++t) {
        // The residuals of the weight, which are multiplied by this norm, cover all other rounding.
        const float own = own_norm.get()[order_[std::min(t, count_ - 1)]], error = basis_rounding * own;
        residual_.get()[t] += error + kScreenTiny;
        norm_.get()[t] = std::max(norm_.get()[t] + error, own + mean_norm);
        scale_correction(t);
      }
    });
    describe_tiles(rests.get());
  }

  void sort_sequences(const float* rest, int64_t last) {
    order_.resize(count_);
    torch::stable::parallel_for(first_, last, 1, [&](int64_t begin, int64_t end) {
      for (int64_t sequence = begin; sequence < end; ++sequence) {
        const int64_t from = input_.sequences.offset[sequence] - begin_;
        const auto tokens = order_.begin() + from, tokens_end = tokens + input_.sequences.length(sequence);
        std::iota(tokens, tokens_end, from);
        std::sort(tokens, tokens_end, [&](int64_t a, int64_t b) { return rest[a] < rest[b]; });
      }
    });
  }

  void find_largest_of_tiles(const float* largest, float* tile_largest) const {
    const int64_t tile_tokens = screen().tile_tokens;
    for (int64_t tile = 0; tile < padded_; tile += tile_tokens) {
      float maximum = 0;
      for (int64_t t = tile; t < tile + tile_tokens; ++t) {
        const float entry = largest[order_[std::min(t, count_ - 1)]];
        if (entry <= kScreenLargest) maximum = std::max(maximum, entry);
      }
      std::fill_n(tile_largest + tile, tile_tokens, maximum);
    }
  }

  void describe_tiles(const float* rests) {
    const int64_t tile_tokens = screen().tile_tokens;
    tiles_.resize(padded_ / tile_tokens);
    for (int64_t t = 0; t < padded_; ++t) {
      ScreenTile& tile = tiles_[t / tile_tokens];
      tile.scale = std::max(tile.scale, scale_.get()[t]);
      tile.residual = std::max(tile.residual, residual_.get()[t]);
      tile.norm = std::max(tile.norm, norm_.get()[t]);
      for (int64_t stage = 0; stage < kScreenStages - 1; ++stage) {
        tile.rest[stage] = std::max(tile.rest[stage], rests[stage * padded_ + t]);
      }
    }
  }

  // Call body(first, scratch) for each group of rows that are rounded together.
  template <typename Body>
  void for_each_group(const Body& body) const {
    const int64_t lanes = screen().lanes;
    torch::stable::parallel_for(0, padded_ / lanes, 4, [&](int64_t begin, int64_t end) {
      const Scratch<float> scratch(2 * dim_ * kMaxLanes);
      for (int64_t i = begin; i < end; ++i) body(i * lanes, scratch.get());
    });
  }

  // Lanes past the last token repeat that token, and nothing reads them.
  RowsToRound<T> hidden(int64_t lane, float* scratch, const PreparedWeight& weight, const float* sign,
                        const float* basis) const {
    const int64_t from = std::min(lane, count_ - 1);
    return {const_data<T>(input_.hidden),
            input_.dim(),
            input_.sequences.row.data() + begin_ + from,
            count_ - from,
            input_.dim(),
            dim_,
            scratch,
            const_data<float>(weight.mean),
            true,
            sign,
            basis,
            nullptr};
  }

  RoundedRows rounded(int64_t lane, float* own_norm, std::array<float*, kScreenStages - 1> rest) const {
    return {units_.get() + lane / kScreenGroup * kScreenGroup * dim_ / 4 + lane % kScreenGroup,
            screen().has_token_rows ? 0 : kScreenGroup,
            scale_.get() + lane,
            residual_.get() + lane,
            norm_.get() + lane,
            own_norm,
            rest,
            {correction(0) + lane, correction(1) + lane, correction(2) + lane},
            nullptr};
  }

  // Turn the sums of a token's integers into corrections for the offset of the weight's bytes.
  void scale_correction(int64_t token) const {
    for (int64_t stage = 0; stage < kScreenStages; ++stage) {
      correction(stage)[token] *= -static_cast<int32_t>(screen().weight_offset);
    }
  }

  int32_t* correction(int64_t stage) const { return correction_.get() + stage * padded_; }

  const HeadInput& input_;
  const int64_t first_, begin_, count_, padded_, dim_;
  const Scratch<uint32_t> units_;
  const Scratch<float> scale_, residual_, norm_;
  const Scratch<int32_t> correction_;
  std::vector<int64_t> order_;  // input token of each rounded token, from begin_ on; empty for the order of the input
  std::vector<ScreenTile> tiles_;
  std::vector<int32_t> sequence_;
  std::vector<float> largest_residual_, largest_norm_;
};

}  // namespace splade_fast::cpu
