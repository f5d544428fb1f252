// Screened forward of the head on the CPU. An int8 product with a proven error bound finds the few pairs of token and
// vocabulary entry whose logit may be positive and, for max pooling, the maximum. Only these pairs are multiplied in
// full precision. Their products use the operations of the dense kernels, so the result is the same to the bit.
// docs/screening.md derives the bound.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/head/rounded_tokens.h"
#include "cpu/positions.h"
#include "cpu/prefetch.h"
#include "cpu/simd/compensated.h"
#include "cpu/simd/kernels.h"

namespace splade_fast::cpu {
namespace {

constexpr int64_t kTokenBytes = int64_t{16} << 20;  // rounded tokens of a block
constexpr int64_t kMaxSequences = 512;              // sequences of a block: each thread keeps the state of all
constexpr int64_t kProductTokens = 1024;            // their products with a panel fit the second-level cache
constexpr size_t kMaxPairs = 4096;                  // pairs that are collected before they are multiplied

// Counts of the work of all threads.
struct WorkCounts {
  std::atomic<int64_t> compared{0};   // pairs of token and entry whose bounds were compared one by one
  std::atomic<int64_t> pairs{0};      // pairs multiplied in full precision
  std::atomic<int64_t> steps{0};      // steps of the int8 product that were made
  std::atomic<int64_t> all_steps{0};  // steps of the whole int8 product

  double step_share() const {
    return all_steps == 0 ? 0.0 : static_cast<double>(steps) / static_cast<double>(all_steps);
  }
};

template <typename T, typename Out>
class ScreenedForward {
  using Acc = Accumulator<T>;

 public:
  ScreenedForward(const HeadInput& input, const PreparedWeight& weight, Pooling pooling, Activation activation)
      : input_(input),
        weight_(weight),
        pooling_(pooling),
        activation_(activation),
        vocabulary_(input.vocabulary()),
        dim_(input.dim()),
        columns_(screen().panel_columns),
        panels_(ceil_div(vocabulary_, columns_)),
        entries_(weight.order, input.vocabulary()),
        sign_(rotation_signs(screen_padded_dim(input.dim()))),
        bias_copy_(input.bias && !std::is_same_v<T, Acc> ? input.vocabulary() : 0),
        bias_(load_bias()),
        units_(weight.units(0)),
        rows_(weight.row(0, 0)),
        panel_units_(weight.packed.size(1) * columns_),
        panel_rows_(weight.rows.size(1) * columns_),
        threads_(std::min<int64_t>(torch::stable::get_num_threads(), panels_)) {
    cut_into_blocks();
    if (pooling == Pooling::kSum) runs_ = find_sum_runs(input);
  }

  // Whether screening costs less than the dense product, estimated from a sample of the panels of the first block.
  bool is_worthwhile() {
    constexpr int64_t kShare = 64, kMinPanels = 4;
    if (blocks_.empty() || panels_ == 0) return true;
    const int64_t sampled = std::min(panels_, std::max(panels_ / kShare, kMinPanels));
    first_tokens_ = round(blocks_[0]);
    WorkCounts work;
    torch::stable::parallel_for(0, sampled, 1, [&](int64_t begin, int64_t end) {
      Worker worker(*this, *first_tokens_, blocks_[0], nullptr);
      for (int64_t i = begin; i < end; ++i) worker.screen_panel(i * panels_ / sampled);
      worker.count(work);
    });
    return relative_cost(work, first_tokens_->count() * sampled * columns_) < kMaxRelativeCost;
  }

  void run(const HeadOutputs& outputs, WorkCounts& work) {
    for (const SequenceRange& block : blocks_) {
      const auto tokens = first_tokens_ ? std::move(first_tokens_) : round(block);
      // Panels differ in the share of their product that is made, so each thread takes the next panel when it has
      // finished one. With a basis the first panels are the most active.
      std::atomic<int64_t> next{0};
      torch::stable::parallel_for(0, threads_, 1, [&](int64_t, int64_t) {
        Worker worker(*this, *tokens, block, &outputs);
        for (int64_t panel = next++; panel < panels_; panel = next++) {
          worker.screen_panel(panel);
          worker.multiply_pairs_from(kMaxPairs);
        }
        worker.multiply_pairs_from(1);
        worker.count(work);
      });
    }
  }

 private:
  struct SequenceRange {
    int64_t first, last;
  };

  // An entry of the output that may be positive, and the first of its pairs.
  struct Entry {
    int64_t sequence, column;
    size_t first_pair;
  };

  // Work of one thread on a block.
  class Worker {
   public:
    Worker(const ScreenedForward& head, const RoundedTokens<T>& tokens, const SequenceRange& block,
           const HeadOutputs* outputs)
        : head_(head),
          rounded_(tokens),
          tokens_(tokens.view()),
          block_(block),
          outputs_(outputs),
          longest_(longest_sequence()),
          threshold_(head.columns_),
          state_((block.last - block.first) * head.columns_),
          products_((std::max(longest_, kProductTokens) + 2 * kScreenGroup) * head.columns_),
          settled_((std::max(longest_, kProductTokens) + 2 * kScreenGroup) / screen().tile_tokens),
          columns_(head.columns_),
          counts_(head.columns_),
          found_tokens_(head.columns_ * longest_),
          scratch_(kMaxLanes * longest_),
          found_{columns_.get(), counts_.get(), found_tokens_.get(), scratch_.get(), 0, 0, 0} {}

    void screen_panel(int64_t panel) {
      const int64_t ahead = head_.panels_ahead(panel);
      prefetch_lines(head_.row(panel + ahead, PreparedWeight::kScale), head_.panel_rows_ * sizeof(float));
      head_.find_thresholds(panel, threshold_.get());
      const ScreenPanel weight{head_.units_ + panel * head_.panel_units_,
                               head_.row(panel, PreparedWeight::kScale),
                               head_.row(panel, PreparedWeight::kResidual),
                               head_.row(panel, PreparedWeight::kNorm),
                               threshold_.get(),
                               head_.row(panel, PreparedWeight::kRest),
                               ahead * head_.panel_units_};
      const std::vector<int64_t>& offset = head_.input_.sequences.offset;
      for (int64_t first = block_.first, last = first; first < block_.last; first = last) {
        while (last < block_.last && (last == first || offset[last + 1] - offset[first] <= kProductTokens)) ++last;
        screen_sequences(panel, weight, first, last);
      }
    }

    void multiply_pairs_from(size_t min_pairs) {
      if (pairs_.size() < min_pairs) return;
      const T* hidden = const_data<T>(head_.input_.hidden);
      const T* weight = const_data<T>(head_.input_.weight);
      std::vector<const T*> tokens(pairs_.size()), weights(pairs_.size());
      for (size_t e = 0; e < entries_.size(); ++e) {
        for (size_t p = entries_[e].first_pair; p < pairs_end(e); ++p) {
          tokens[p] = hidden + head_.input_.sequences.row[pairs_[p]] * head_.dim_;
          weights[p] = weight + entries_[e].column * head_.dim_;
        }
      }
      std::vector<Acc> products(pairs_.size());
      kernels<T>().multiply_pairs(tokens.data(), weights.data(), static_cast<int64_t>(pairs_.size()), head_.dim_,
                                  products.data());
      head_.pooling_ == Pooling::kMax ? pool_max(products) : pool_sum(products);
      multiplied_ += static_cast<int64_t>(pairs_.size());
      entries_.clear();
      pairs_.clear();
    }

    void count(WorkCounts& work) const {
      work.compared += found_.compared;
      work.pairs += multiplied_ + static_cast<int64_t>(pairs_.size());
      work.steps += steps_;
      work.all_steps += all_steps_;
    }

   private:
    int64_t longest_sequence() const {
      int64_t longest = 0;
      for (int64_t b = block_.first; b < block_.last; ++b) {
        longest = std::max(longest, head_.input_.sequences.length(b));
      }
      return longest;
    }

    void screen_sequences(int64_t panel, const ScreenPanel& weight, int64_t first, int64_t last) {
      const HeadInput& input = head_.input_;
      const std::vector<int64_t>& offset = input.sequences.offset;
      if (offset[first] == offset[last]) return;
      const int64_t origin = offset[block_.first], first_column = panel * head_.columns_;
      // The product begins at the start of a group of tokens.
      const int64_t start = (offset[first] - origin) / kScreenGroup * kScreenGroup;
      float* state = state_.get() - tokens_.sequence[start] * head_.columns_;
      const int64_t states = last - block_.first - tokens_.sequence[start];
      std::fill_n(state_.get(), states * head_.columns_, -std::numeric_limits<float>::infinity());
      const int64_t end = offset[last] - origin, tile = screen().tile_tokens;
      steps_ += screen().multiply(tokens_, weight, start, end, products_.get(), state, settled_.get());
      all_steps_ += ceil_div(end - start, tile) * tokens_.steps;
      for (int64_t sequence = first; sequence < last; ++sequence) {
        const int64_t begin = offset[sequence] - origin, length = input.sequences.length(sequence);
        if (length == 0 || is_settled(begin - start, length)) continue;
        screen().find_pairs(
            weight,
            {products_.get() + (begin - start) * head_.columns_, state + (sequence - block_.first) * head_.columns_,
             settled_.get(), begin - start, tokens_.residual + begin, tokens_.norm + begin,
             rounded_.largest_residual(sequence), rounded_.largest_norm(sequence), length},
            head_.pooling_ == Pooling::kMax, found_);
        const int32_t* token = found_.tokens;
        for (int64_t e = 0; e < found_.entries; token += found_.counts[e++]) {
          // Columns past the vocabulary repeat the last entry.
          if (first_column + found_.columns[e] >= head_.vocabulary_) continue;
          entries_.push_back({sequence, head_.entries_[first_column + found_.columns[e]], pairs_.size()});
          for (int64_t i = 0; i < found_.counts[e]; ++i) pairs_.push_back(rounded_.token(begin + token[i]));
          if (!rounded_.is_in_input_order()) std::sort(pairs_.end() - found_.counts[e], pairs_.end());
        }
      }
    }

    bool is_settled(int64_t first, int64_t tokens) const {
      const int64_t tile = screen().tile_tokens, from = first / tile, to = (first + tokens - 1) / tile + 1;
      return std::memchr(settled_.get() + from, 0, to - from) == nullptr;
    }

    size_t pairs_end(size_t entry) const {
      return entry + 1 < entries_.size() ? entries_[entry + 1].first_pair : pairs_.size();
    }

    // Offset of an entry in (B, V).
    int64_t place(size_t entry) const { return entries_[entry].sequence * head_.vocabulary_ + entries_[entry].column; }

    std::vector<Acc> biases(const std::vector<int64_t>& columns) const {
      std::vector<Acc> result(columns.size(), Acc(0));
      for (size_t i = 0; i < columns.size() && head_.bias_; ++i) result[i] = head_.bias_[columns[i]];
      return result;
    }

    void pool_max(const std::vector<Acc>& products) const {
      std::vector<Acc> logits(entries_.size());
      std::vector<int32_t> positions(entries_.size());
      std::vector<int64_t> columns(entries_.size());
      for (size_t e = 0; e < entries_.size(); ++e) {
        // NaN replaces every number and is kept, and ties keep the earlier token, as beats() in isa.h defines it.
        Acc largest = -std::numeric_limits<Acc>::infinity();
        for (size_t p = entries_[e].first_pair; p < pairs_end(e); ++p) {
          if (products[p] <= largest || largest != largest) continue;
          largest = products[p];
          positions[e] = head_.input_.sequences.position[pairs_[p]];
        }
        logits[e] = largest;
        columns[e] = entries_[e].column;
      }
      std::vector<Out> pooled(entries_.size());
      kernels<Out>().activate_logits(logits.data(), biases(columns).data(), static_cast<int64_t>(entries_.size()),
                                     head_.activation_, pooled.data());
      const bool should_save = outputs_->max_logits.numel() > 0;
      Out* all_pooled = mutable_data<Out>(outputs_->pooled);
      Acc* all_logits = should_save ? mutable_data<Acc>(outputs_->max_logits) : nullptr;
      for (size_t e = 0; e < entries_.size(); ++e) {
        all_pooled[place(e)] = pooled[e];
        if (should_save) all_logits[place(e)] = logits[e];
      }
      if (!should_save) return;
      dispatch_positions(outputs_->argmax, [&](auto* all_positions) {
        using Stored = std::remove_pointer_t<decltype(all_positions)>;
        for (size_t e = 0; e < entries_.size(); ++e) all_positions[place(e)] = static_cast<Stored>(positions[e]);
      });
    }

    // Sum up by the runs of the dense kernel. The tokens that were ruled out would have added zeros.
    void pool_sum(std::vector<Acc>& products) const {
      std::vector<int64_t> columns(products.size());
      for (size_t e = 0; e < entries_.size(); ++e) {
        std::fill(columns.begin() + entries_[e].first_pair, columns.begin() + pairs_end(e), entries_[e].column);
      }
      std::vector<Acc> weights(products.size());
      kernels<Acc>().activate_logits(products.data(), biases(columns).data(), static_cast<int64_t>(products.size()),
                                     head_.activation_, weights.data());
      for (size_t e = 0; e < entries_.size(); ++e) {
        Acc total = 0, lost = 0, run = 0;
        for (size_t p = entries_[e].first_pair; p < pairs_end(e); ++p) {
          run += weights[p];
          if (p + 1 < pairs_end(e) && head_.runs_[pairs_[p + 1]] == head_.runs_[pairs_[p]]) continue;
          add_part(total, lost, run);
          run = 0;
        }
        total = whole_sum(total, lost);
        kernels<Out>().store(mutable_data<Out>(outputs_->pooled) + place(e), &total, 1);
      }
    }

    const ScreenedForward& head_;
    const RoundedTokens<T>& rounded_;
    const ScreenTokens tokens_;
    const SequenceRange block_;
    const HeadOutputs* outputs_;
    const int64_t longest_;
    const Scratch<float> threshold_, state_, products_;
    const Scratch<uint8_t> settled_;
    const Scratch<int32_t> columns_, counts_, found_tokens_, scratch_;
    ScreenedPairs found_;
    std::vector<Entry> entries_;
    std::vector<int64_t> pairs_;  // token of each pair
    int64_t multiplied_ = 0, steps_ = 0, all_steps_ = 0;
  };

  std::unique_ptr<RoundedTokens<T>> round(const SequenceRange& block) const {
    return std::make_unique<RoundedTokens<T>>(input_, weight_, sign_, block.first, block.last);
  }

  const Acc* load_bias() const {
    if (!input_.bias) return nullptr;
    if constexpr (std::is_same_v<T, Acc>) {
      return const_data<T>(*input_.bias);
    } else {
      kernels<T>().load(bias_copy_.get(), const_data<T>(*input_.bias), vocabulary_);
      return bias_copy_.get();
    }
  }

  const float* row(int64_t panel, PreparedWeight::Row which) const {
    return rows_ + panel * panel_rows_ + which * columns_;
  }

  // Distance to the panel that a thread probably takes next, or 0 if there is none.
  int64_t panels_ahead(int64_t panel) const { return panel + threads_ < panels_ ? threads_ : 0; }

  // Write the products below which the logits of a panel cannot be positive.
  void find_thresholds(int64_t panel, float* threshold) const {
    std::fill_n(threshold, columns_, std::numeric_limits<float>::infinity());
    const float* mean_dots = row(panel, PreparedWeight::kMeanDot);
    const int64_t first = panel * columns_, count = std::min(columns_, vocabulary_ - first);
    for (int64_t i = 0; i < count; ++i) {
      const float bias = bias_ ? static_cast<float>(bias_[entries_[first + i]]) : 0.0f;
      if (bias == -std::numeric_limits<float>::infinity()) continue;
      threshold[i] = -(bias + mean_dots[i]) - kScreenShiftRounding * (std::abs(bias) + std::abs(mean_dots[i]));
    }
  }

  void cut_into_blocks() {
    const std::vector<int64_t>& offset = input_.sequences.offset;
    // With a basis the tokens are also kept as floats until they are rounded.
    const int64_t bytes = weight_.basis ? 1 + sizeof(float) : 1;
    const int64_t max_tokens = std::max<int64_t>(kTokenBytes / (bytes * screen_padded_dim(input_.dim())), 1);
    for (int64_t first = 0; first < input_.sequences.batch();) {
      int64_t last = first + 1;
      while (last < input_.sequences.batch() && last - first < kMaxSequences &&
             offset[last + 1] - offset[first] <= max_tokens) {
        ++last;
      }
      if (offset[last] > offset[first]) blocks_.push_back({first, last});
      first = last;
    }
  }

  // Estimated cost, relative to the dense product of as many pairs of token and entry. The constants are fitted to
  // measurements (docs/screening.md) and count multiplications of the float32 product: for storing the int8 product of
  // a pair, for comparing a pair with its bound, and for fetching and multiplying a pair in full precision.
  double relative_cost(const WorkCounts& work, int64_t pairs) const {
    constexpr double kStore = 8, kCompare = 30, kFetch = 2400, kMultiply = 14.5;
    const double all = static_cast<double>(pairs), dim = static_cast<double>(dim_);
    const double steps = dim / kernels<T>().step_dims;
    const double product = all * (work.step_share() * dim / screen().speed + kStore);
    return (product + kCompare * work.compared + (kFetch + kMultiply * steps) * work.pairs) / (all * steps);
  }

  static constexpr double kMaxRelativeCost = 0.9;

  const HeadInput& input_;
  const PreparedWeight& weight_;
  const Pooling pooling_;
  const Activation activation_;
  const int64_t vocabulary_, dim_;  // copies, because a tensor returns its sizes through a call of torch
  const int64_t columns_, panels_;
  const ColumnEntries entries_;
  const std::vector<float> sign_;
  const Scratch<Acc> bias_copy_;
  const Acc* const bias_;  // (vocabulary,) or null
  // The prepared weight, (panels, panel_units_) and (panels, panel_rows_). A call of a tensor for each panel would cost
  // a tenth of the time of a few tokens.
  const uint32_t* const units_;
  const float* const rows_;
  const int64_t panel_units_, panel_rows_;
  const int64_t threads_;
  std::vector<SequenceRange> blocks_;
  std::unique_ptr<RoundedTokens<T>> first_tokens_;  // of the first block, if is_worthwhile() has rounded them
  std::vector<int64_t> runs_;
};

void fill_with_zeros(const Tensor& output) {
  if (output.numel() == 0) return;
  prefer_huge_pages(output);
  const int64_t row = output.size(1) * static_cast<int64_t>(output.element_size());
  torch::stable::parallel_for(0, output.size(0), 1, [&](int64_t begin, int64_t end) {
    std::memset(mutable_data<char>(output) + begin * row, 0, (end - begin) * row);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& hidden, const Tensor& weight,
                                                   const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
                                                   const std::optional<Tensor>& cu_seqlens, int64_t pooling_code,
                                                   int64_t activation_code, bool save, bool float_output,
                                                   const Tensor& mean, const Tensor& packed, const Tensor& rows,
                                                   const std::optional<Tensor>& basis,
                                                   const std::optional<Tensor>& order, bool may_decline) {
  const Pooling pooling = check_pooling(pooling_code);
  const Activation activation = check_activation(activation_code);
  const HeadInput input = check_head_input(hidden, weight, bias, mask, cu_seqlens);
  check_mean(mean, weight);
  check_basis(basis, order, weight);
  const PreparedWeight prepared{as_contiguous(mean), as_contiguous(packed), as_contiguous(rows),
                                contiguous_or_none(basis), contiguous_or_none(order)};
  const int64_t columns = screen().panel_columns, panels = ceil_div(weight.size(0), columns);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Int && rows.scalar_type() == ScalarType::Float &&
                      packed.dim() == 3 && packed.size(0) == panels &&
                      packed.size(1) == screen_padded_dim(weight.size(1)) / 4 && packed.size(2) == columns &&
                      rows.dim() == 3 && rows.size(0) == panels && rows.size(2) == columns &&
                      rows.size(1) == (basis ? PreparedWeight::kBasisRows : PreparedWeight::kRows),
                  "packed and rows must be what head_prepare made of weight");
  // The report of head_forward_screened in ops.cpp.
  const Tensor report = new_tensor(hidden, std::vector<int64_t>{4}, ScalarType::Long);
  int64_t* counts = mutable_data<int64_t>(report);
  HeadOutputs outputs;
  dispatch_floating(hidden.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const auto compute = [&](auto out) {
      // Before the smaller blocks of the head, which would take parts of the memory of earlier outputs.
      outputs = new_head_outputs(hidden, input, cu_seqlens, pooling, save, float_output);
      ScreenedForward<T, typename decltype(out)::type> head(input, prepared, pooling, activation);
      WorkCounts work;
      const bool is_declined = may_decline && !head.is_worthwhile();
      if (is_declined) outputs = new_head_outputs(hidden, input, cu_seqlens, pooling, save, float_output, true);
      if (!is_declined) {
        fill_with_zeros(outputs.pooled);
        fill_with_zeros(outputs.max_logits);
        fill_with_zeros(outputs.argmax);
        head.run(outputs, work);
      }
      counts[0] = is_declined;
      counts[1] = work.compared;
      counts[2] = work.pairs;
      counts[3] = std::lround(100 * work.step_share());
    };
    float_output ? compute(Type<Accumulator<T>>{}) : compute(Type<T>{});
  });
  return {outputs.pooled, outputs.max_logits, outputs.argmax, report};
}

}  // namespace
}  // namespace splade_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CPU, m) {
  m.impl("head_forward_screened", TORCH_BOX(&splade_fast::cpu::forward));
}
