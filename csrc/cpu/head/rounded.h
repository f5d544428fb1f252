// The tokens of a call, rounded and packed for the int8 product.
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
        padded_((count_ + kScreenGroup - 1) / kScreenGroup * kScreenGroup),
        depth_(static_cast<int64_t>(sign.size())),
        units_(padded_ * depth_ / 4),
        scale_(padded_),
        residual_(padded_),
        norm_(padded_),
        start_(kScreenStages * padded_),
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
            {start(0), start(1), start(2)},
            sequence_.data(),
            depth_ / 4,
            tiles_.empty() ? 1 : kScreenStages,
            tiles_.data()};
  }
  int64_t count() const { return count_; }
  // Of all tokens of a sequence.
  float largest_residual(int64_t sequence) const { return largest_residual_[sequence - first_]; }
  float largest_norm(int64_t sequence) const { return largest_norm_[sequence - first_]; }
  // Of the input: which one the i-th is. Those of a sequence stay together, but need not ascend.
  int64_t token(int64_t i) const { return begin_ + (order_.empty() ? i : order_[i]); }
  bool in_order() const { return order_.empty(); }

 private:
  // Rotated by signs and Hadamard transforms, with a scale each.
  void round_rotated(const PreparedWeight& weight, const std::vector<float>& sign) {
    const float rounding = screen_rounding(input_.depth());
    const float mean_norm = norm_of(const_data<float>(weight.mean), weight.mean.numel());
    for_lanes([&](int64_t lane, float* scratch) {
      float own_norm[kMaxLanes], rest[kScreenStages - 1][kMaxLanes];
      row_functions<T>(screen()).round(hidden(lane, scratch, weight, sign.data(), nullptr), screen().token_levels, 0,
                                       rounded(lane, own_norm, {rest[0], rest[1]}));
      for (int64_t t = lane; t < lane + screen().lanes; ++t) {
        residual_.get()[t] += rounding * (norm_.get()[t] + mean_norm) + kScreenTiny;
        finish_start(t);
        start(0)[t] += start(1)[t] + start(2)[t];
      }
    });
  }

  // Along the basis, a tile with one scale. Each sequence begins with the tokens of which the first stage tells most:
  // those of a tile are then alike.
  void round_along_basis(const PreparedWeight& weight, int64_t last) {
    const Scratch<float> rows(padded_ * depth_), largest(padded_), own_norm(padded_), rest(padded_);
    for_lanes([&](int64_t lane, float* scratch) {
      row_functions<T>(screen()).rotate(
          hidden(lane, scratch, weight, nullptr, const_data<float>(*weight.basis)),
          {rows.get() + lane * depth_, largest.get() + lane, own_norm.get() + lane, rest.get() + lane});
    });
    sort_sequences(rest.get(), last);
    const Scratch<float> tile_largest(padded_), rests((kScreenStages - 1) * padded_);
    find_largest_of_tiles(largest.get(), tile_largest.get());
    const float basis_rounding = screen_basis_rounding(input_.depth()) * norm_of_basis(*weight.basis, 0);
    const float mean_norm = norm_of(const_data<float>(weight.mean), weight.mean.numel());
    for_lanes([&](int64_t lane, float* scratch) {
      const int64_t from = std::min(lane, count_ - 1);
      float unused[kMaxLanes];
      row_functions<float>(screen()).round({rows.get(), depth_, order_.data() + from, count_ - from, depth_, depth_,
                                            scratch, nullptr, true, nullptr, nullptr, tile_largest.get() + lane},
                                           screen().token_levels, 0,
                                           rounded(lane, unused, {rests.get() + lane, rests.get() + padded_ + lane}));
      for (int64_t t = lane; t < lane + screen().lanes; ++t) {
        // All other rounding is in the entries' residuals, which are multiplied by this norm.
        const float own = own_norm.get()[order_[std::min(t, count_ - 1)]], lost = basis_rounding * own;
        residual_.get()[t] += lost + kScreenTiny;
        norm_.get()[t] = std::max(norm_.get()[t] + lost, own + mean_norm);
        finish_start(t);
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
      float most = 0;
      for (int64_t t = tile; t < tile + tile_tokens; ++t) {
        const float one = largest[order_[std::min(t, count_ - 1)]];
        if (one <= kScreenLargest) most = std::max(most, one);
      }
      std::fill_n(tile_largest + tile, tile_tokens, most);
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

  // use(lane, scratch) for the first of the rows that are rounded at a time.
  template <typename Use>
  void for_lanes(const Use& use) const {
    const int64_t lanes = screen().lanes;
    torch::stable::parallel_for(0, padded_ / lanes, 4, [&](int64_t begin, int64_t end) {
      const Scratch<float> scratch(2 * depth_ * kMaxLanes);
      for (int64_t i = begin; i < end; ++i) use(i * lanes, scratch.get());
    });
  }

  // Lanes past the last token repeat it; nothing reads them.
  RowsToRound<T> hidden(int64_t lane, float* scratch, const PreparedWeight& weight, const float* sign,
                        const float* basis) const {
    const int64_t from = std::min(lane, count_ - 1);
    return {const_data<T>(input_.hidden),
            input_.depth(),
            input_.sequences.row.data() + begin_ + from,
            count_ - from,
            input_.depth(),
            depth_,
            scratch,
            const_data<float>(weight.mean),
            true,
            sign,
            basis,
            nullptr};
  }

  RoundedRows rounded(int64_t lane, float* own_norm, std::array<float*, kScreenStages - 1> rest) const {
    return {units_.get() + lane / kScreenGroup * kScreenGroup * depth_ / 4 + lane % kScreenGroup,
            screen().token_rows ? 0 : kScreenGroup,
            scale_.get() + lane,
            residual_.get() + lane,
            norm_.get() + lane,
            own_norm,
            rest,
            {start(0) + lane, start(1) + lane, start(2) + lane},
            nullptr};
  }

  // From the sums of the integers.
  void finish_start(int64_t token) const {
    for (int64_t stage = 0; stage < kScreenStages; ++stage) {
      start(stage)[token] *= -static_cast<int32_t>(screen().weight_offset);
    }
  }

  int32_t* start(int64_t stage) const { return start_.get() + stage * padded_; }

  const HeadInput& input_;
  const int64_t first_, begin_, count_, padded_, depth_;
  const Scratch<uint32_t> units_;
  const Scratch<float> scale_, residual_, norm_;
  const Scratch<int32_t> start_;
  std::vector<int64_t> order_;  // of the tokens, from begin_ on; empty: that of the input
  std::vector<ScreenTile> tiles_;
  std::vector<int32_t> sequence_;
  std::vector<float> largest_residual_, largest_norm_;
};

}  // namespace splade_fast::cpu
