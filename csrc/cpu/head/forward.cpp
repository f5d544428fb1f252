// Dense forward of the head on the CPU. Each panel of vocabulary entries is multiplied by the packed real tokens, and
// the products are pooled while they are in the first-level cache. The logits are never written to memory.
//
// Tokens are packed in blocks of at most kTokenBytes, and each panel of the weight is packed once per block. A sequence
// that is longer than a block carries its maximum or sum, over the whole vocabulary, from block to block.
#include <torch/csrc/stable/ops.h>

#include <limits>

#include "cpu/head/blocks.h"
#include "cpu/head/head.h"
#include "cpu/memory.h"
#include "cpu/positions.h"
#include "cpu/simd/compensated.h"
#include "cpu/simd/kernels.h"

namespace splade_fast::cpu {
namespace {

constexpr int64_t kTokenBytes = int64_t{16} << 20;  // packed tokens of a block: half of a common last-level cache
constexpr int64_t kMaxSequences = 512;              // sequences of a block: each thread keeps the state of all

// Largest number of tokens of a block.
template <typename T>
int64_t max_block_tokens(const HeadInput& input) {
  const int64_t tile = kernels<T>().tile_tokens;
  const int64_t tile_bytes = std::max<int64_t>(kernels<T>().packed_bytes(tile, input.dim()), 1);
  const int64_t tiles = ceil_div(input.sequences.tokens(), tile);
  return tile * std::min(std::max<int64_t>(kTokenBytes / tile_bytes, 1), tiles);
}

template <typename T>
std::vector<Block> cut_tokens(const HeadInput& input) {
  const int64_t tokens = std::max(max_block_tokens<T>(input), kernels<T>().tile_tokens);
  return cut_into_blocks(input.sequences.offset, tokens, kMaxSequences);
}

template <typename T, typename Out>
class Forward {
  using Acc = Accumulator<T>;

 public:
  Forward(const HeadInput& input, Pooling pooling, Activation activation, const HeadOutputs& outputs)
      : input_(input),
        pooling_(pooling),
        activation_(activation),
        outputs_(outputs),
        should_save_(outputs.max_logits.numel() > 0),
        columns_(kernels<T>().panel_columns),
        panels_(ceil_div(input.vocabulary(), columns_)) {}

  void run() {
    const int64_t tile = kernels<T>().tile_tokens;
    const int64_t tile_bytes = kernels<T>().packed_bytes(tile, input_.dim());
    const Scratch<char> packed(max_block_tokens<T>(input_) / tile * tile_bytes);
    for (const Block& block : cut_tokens<T>(input_)) {
      if (!block.has_last_token && carried_value_ == nullptr) allocate_carried();
      pack_tokens(block, packed.get(), tile_bytes);
      torch::stable::parallel_for(0, panels_, 1,
                                  [&](int64_t begin, int64_t end) { run_panels(block, packed.get(), begin, end); });
    }
  }

 private:
  void allocate_carried() {
    carried_value_ = std::make_unique<Scratch<Acc>>(panels_ * columns_);
    carried_argmax_ = std::make_unique<Scratch<Position<Acc>>>(panels_ * columns_);
    carried_lost_ = std::make_unique<Scratch<Acc>>(panels_ * columns_);
  }

  void pack_tokens(const Block& block, char* packed, int64_t tile_bytes) const {
    const Kernels<T>& kernel = kernels<T>();
    const int64_t tile = kernel.tile_tokens, tokens = block.end - block.begin;
    torch::stable::parallel_for(0, ceil_div(tokens, tile), 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        kernel.pack(packed + i * tile_bytes, tile, const_data<T>(input_.hidden), input_.dim(),
                    input_.sequences.row.data() + block.begin + i * tile, std::min(tile, tokens - i * tile),
                    input_.dim());
      }
    });
  }

  void run_panels(const Block& block, const char* packed_tokens, int64_t begin, int64_t end) const {
    const Kernels<T>& kernel = kernels<T>();
    const bool is_carried = !(block.has_first_token && block.has_last_token);
    const int64_t rows = is_carried ? 0 : block.last - block.first;
    const Scratch<char> packed_weight(kernel.packed_bytes(columns_, input_.dim()));
    const Scratch<Acc> value(rows * columns_), lost(rows * columns_), bias(columns_);
    const Scratch<Position<Acc>> argmax(rows * columns_);
    // The state has a row for each sequence of the block.
    std::vector<int32_t> sequence(block.end - block.begin);
    for (size_t t = 0; t < sequence.size(); ++t) {
      sequence[t] = input_.sequences.sequence[block.begin + t] - static_cast<int32_t>(block.first);
    }
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first_column = panel * columns_;
      const int64_t count = std::min(columns_, input_.vocabulary() - first_column);
      Acc* state = is_carried ? carried_value_->get() + first_column : value.get();
      Acc* state_lost = is_carried ? carried_lost_->get() + first_column : lost.get();
      Position<Acc>* positions = is_carried ? carried_argmax_->get() + first_column : argmax.get();
      if (block.has_first_token) {
        const Acc start = pooling_ == Pooling::kMax ? -std::numeric_limits<Acc>::infinity() : Acc(0);
        std::fill_n(state, std::max<int64_t>(rows, 1) * columns_, start);
        if (pooling_ == Pooling::kSum) std::fill_n(state_lost, std::max<int64_t>(rows, 1) * columns_, Acc(0));
        std::fill_n(positions, std::max<int64_t>(rows, 1) * columns_, Position<Acc>(0));
      }
      std::fill_n(bias.get(), columns_, Acc(0));
      if (input_.bias) kernel.load(bias.get(), const_data<T>(*input_.bias) + first_column, count);
      const T* weight = const_data<T>(input_.weight) + first_column * input_.dim();
      kernel.pack(packed_weight.get(), columns_, weight, input_.dim(), nullptr, count, input_.dim());
      const int64_t next = panel + 1 < end ? std::min(columns_, input_.vocabulary() - first_column - count) : 0;
      const Panel<Acc> work{packed_tokens,
                            packed_weight.get(),
                            input_.dim(),
                            block.end - block.begin,
                            sequence.data(),
                            input_.sequences.position.data() + block.begin,
                            state,
                            should_save_ ? positions : nullptr,
                            state_lost,
                            columns_,
                            bias.get(),
                            activation_,
                            weight + count * input_.dim(),
                            next * input_.dim() * static_cast<int64_t>(sizeof(T))};
      pooling_ == Pooling::kMax ? kernel.head_max(work) : kernel.head_sum(work);
      if (!block.has_last_token) continue;
      for (int64_t b = block.first; b < block.last; ++b) {
        const int64_t row = (b - block.first) * columns_;
        store_outputs(b, first_column, count, state + row, state_lost + row, positions + row, bias.get());
      }
    }
  }

  void store_outputs(int64_t b, int64_t first_column, int64_t count, Acc* state, const Acc* lost,
                     const Position<Acc>* positions, const Acc* bias) const {
    const int64_t offset = b * input_.vocabulary() + first_column;
    Out* pooled = mutable_data<Out>(outputs_.pooled) + offset;
    if (pooling_ == Pooling::kSum) {
      for (int64_t i = 0; i < count; ++i) state[i] = whole_sum(state[i], lost[i]);
      kernels<Out>().store(pooled, state, count);
      return;
    }
    // The maximum of a sequence without tokens is -inf, without the bias.
    kernels<Out>().activate_logits(state, input_.sequences.length(b) > 0 ? bias : nullptr, count, activation_, pooled);
    if (should_save_) {
      std::copy_n(state, count, mutable_data<Acc>(outputs_.max_logits) + offset);
      store_positions(outputs_.argmax, offset, positions, count);
    }
  }

  const HeadInput& input_;
  const Pooling pooling_;
  const Activation activation_;
  const HeadOutputs& outputs_;
  const bool should_save_;
  const int64_t columns_, panels_;
  std::unique_ptr<Scratch<Acc>> carried_value_, carried_lost_;
  std::unique_ptr<Scratch<Position<Acc>>> carried_argmax_;
};

}  // namespace

void head_forward_dense(const HeadInput& input, Pooling pooling, Activation activation, const HeadOutputs& outputs) {
  dispatch_floating(input.hidden.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if (outputs.pooled.scalar_type() == input.hidden.scalar_type()) {
      Forward<T, T>(input, pooling, activation, outputs).run();
    } else {
      Forward<T, Accumulator<T>>(input, pooling, activation, outputs).run();
    }
  });
}

std::vector<int64_t> find_sum_runs(const HeadInput& input) {
  std::vector<int64_t> run(input.sequences.tokens());
  dispatch_floating(input.hidden.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t tile = kernels<T>().tile_tokens;
    for (const Block& block : cut_tokens<T>(input)) {
      for (int64_t t = block.begin; t < block.end; ++t) run[t] = t - (t - block.begin) % tile;
    }
  });
  return run;
}

}  // namespace splade_fast::cpu
