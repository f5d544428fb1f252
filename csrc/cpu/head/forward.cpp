// head forward on the CPU: every panel of vocabulary entries meets the packed real tokens in a register-tiled product
// whose result is reduced while it is in the first-level cache; no logits are written.
//
// The tokens are packed once (at most kTokenBytes at a time), each panel of the weight once per such block. A sequence
// longer than a block carries its running maximum (or sum) over the whole vocabulary from block to block.
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

constexpr int64_t kTokenBytes = int64_t{16} << 20;  // packed tokens at a time: half of a common last-level cache
constexpr int64_t kMaxSequences = 512;              // state rows of one block, per thread

// Tokens that are packed at a time.
template <typename T>
int64_t block_tokens(const HeadInput& input) {
  const int64_t tile = kernels<T>().tile_tokens;
  const int64_t tile_bytes = std::max<int64_t>(kernels<T>().packed_bytes(tile, input.depth()), 1);
  const int64_t tiles = (input.sequences.tokens() + tile - 1) / tile;
  return tile * std::min(std::max<int64_t>(kTokenBytes / tile_bytes, 1), tiles);
}

template <typename T>
std::vector<Block> blocks_of(const HeadInput& input) {
  const int64_t tokens = std::max(block_tokens<T>(input), kernels<T>().tile_tokens);
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
        save_(outputs.max_logits.numel() > 0),
        columns_(kernels<T>().panel_columns),
        panels_((input.vocabulary() + columns_ - 1) / columns_) {}

  void run() {
    const int64_t tile = kernels<T>().tile_tokens;
    const int64_t tile_bytes = kernels<T>().packed_bytes(tile, input_.depth());
    const Scratch<char> packed(block_tokens<T>(input_) / tile * tile_bytes);
    for (const Block& block : blocks_of<T>(input_)) {
      if (!block.closes && carried_value_ == nullptr) allocate_carried();
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
    torch::stable::parallel_for(0, (tokens + tile - 1) / tile, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        kernel.pack(packed + i * tile_bytes, tile, const_data<T>(input_.hidden), input_.depth(),
                    input_.sequences.row.data() + block.begin + i * tile, std::min(tile, tokens - i * tile),
                    input_.depth());
      }
    });
  }

  void run_panels(const Block& block, const char* packed_tokens, int64_t begin, int64_t end) const {
    const Kernels<T>& kernel = kernels<T>();
    const bool carried = !(block.opens && block.closes);
    const int64_t rows = carried ? 0 : block.last - block.first;
    const Scratch<char> packed_weight(kernel.packed_bytes(columns_, input_.depth()));
    const Scratch<Acc> value(rows * columns_), lost(rows * columns_), bias(columns_);
    const Scratch<Position<Acc>> argmax(rows * columns_);
    // State rows count from the first sequence of the block.
    std::vector<int32_t> sequence(block.end - block.begin);
    for (size_t t = 0; t < sequence.size(); ++t) {
      sequence[t] = input_.sequences.sequence[block.begin + t] - static_cast<int32_t>(block.first);
    }
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first_column = panel * columns_;
      const int64_t count = std::min(columns_, input_.vocabulary() - first_column);
      Acc* state = carried ? carried_value_->get() + first_column : value.get();
      Acc* state_lost = carried ? carried_lost_->get() + first_column : lost.get();
      Position<Acc>* positions = carried ? carried_argmax_->get() + first_column : argmax.get();
      if (block.opens) {
        const Acc start = pooling_ == Pooling::kMax ? -std::numeric_limits<Acc>::infinity() : Acc(0);
        std::fill_n(state, std::max<int64_t>(rows, 1) * columns_, start);
        if (pooling_ == Pooling::kSum) std::fill_n(state_lost, std::max<int64_t>(rows, 1) * columns_, Acc(0));
        std::fill_n(positions, std::max<int64_t>(rows, 1) * columns_, Position<Acc>(0));
      }
      std::fill_n(bias.get(), columns_, Acc(0));
      if (input_.bias) kernel.load(bias.get(), const_data<T>(*input_.bias) + first_column, count);
      const T* weight = const_data<T>(input_.weight) + first_column * input_.depth();
      kernel.pack(packed_weight.get(), columns_, weight, input_.depth(), nullptr, count, input_.depth());
      const int64_t next = panel + 1 < end ? std::min(columns_, input_.vocabulary() - first_column - count) : 0;
      const Panel<Acc> work{packed_tokens,
                            packed_weight.get(),
                            input_.depth(),
                            block.end - block.begin,
                            sequence.data(),
                            input_.sequences.position.data() + block.begin,
                            state,
                            save_ ? positions : nullptr,
                            state_lost,
                            columns_,
                            bias.get(),
                            activation_,
                            weight + count * input_.depth(),
                            next * input_.depth() * static_cast<int64_t>(sizeof(T))};
      pooling_ == Pooling::kMax ? kernel.head_max(work) : kernel.head_sum(work);
      if (!block.closes) continue;
      for (int64_t b = block.first; b < block.last; ++b) {
        const int64_t row = (b - block.first) * columns_;
        finish(b, first_column, count, state + row, state_lost + row, positions + row, bias.get());
      }
    }
  }

  void finish(int64_t b, int64_t first_column, int64_t count, Acc* state, const Acc* lost,
              const Position<Acc>* positions, const Acc* bias) const {
    const int64_t offset = b * input_.vocabulary() + first_column;
    Out* pooled = mutable_data<Out>(outputs_.pooled) + offset;
    if (pooling_ == Pooling::kSum) {
      for (int64_t i = 0; i < count; ++i) state[i] = whole_sum(state[i], lost[i]);
      kernels<Out>().store(pooled, state, count);
      return;
    }
    // A sequence without tokens stays at -inf whatever the bias.
    kernels<Out>().finish_max(state, input_.sequences.length(b) > 0 ? bias : nullptr, count, activation_, pooled);
    if (save_) {
      std::copy_n(state, count, mutable_data<Acc>(outputs_.max_logits) + offset);
      store_positions(outputs_.argmax, offset, positions, count);
    }
  }

  const HeadInput& input_;
  const Pooling pooling_;
  const Activation activation_;
  const HeadOutputs& outputs_;
  const bool save_;
  const int64_t columns_, panels_;
  std::unique_ptr<Scratch<Acc>> carried_value_, carried_lost_;
  std::unique_ptr<Scratch<Position<Acc>>> carried_argmax_;
};

}  // namespace

void head_forward(const HeadInput& input, Pooling pooling, Activation activation, const HeadOutputs& outputs) {
  dispatch_floating(input.hidden.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if (outputs.pooled.scalar_type() == input.hidden.scalar_type()) {
      Forward<T, T>(input, pooling, activation, outputs).run();
    } else {
      Forward<T, Accumulator<T>>(input, pooling, activation, outputs).run();
    }
  });
}

std::vector<int64_t> head_runs(const HeadInput& input) {
  std::vector<int64_t> run(input.sequences.tokens());
  dispatch_floating(input.hidden.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t tile = kernels<T>().tile_tokens;
    for (const Block& block : blocks_of<T>(input)) {
      for (int64_t t = block.begin; t < block.end; ++t) run[t] = t - (t - block.begin) % tile;
    }
  });
  return run;
}

}  // namespace splade_fast::cpu
