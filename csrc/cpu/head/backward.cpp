// Backward of the head with max pooling on the CPU. Only active pairs (b, v), with a positive pooled value and a
// nonzero gradient, cost work. With t the argmax of a pair and c = grad * activation'(logit):
//   grad_weight[v] = sum over b of c * hidden[t]    (each thread owns rows v)
//   grad_bias[v]   = sum over b of c
//   grad_hidden[t] = sum over v of c * weight[v]    (each thread owns some sequences and a slice of the dimensions)
// One thread sums up each element, in ascending order of b or v, so the bits do not depend on the number of threads.
#include <torch/csrc/stable/ops.h>

#include <numeric>

#include "cpu/head/head.h"
#include "cpu/memory.h"
#include "cpu/positions.h"
#include "cpu/simd/kernels.h"

namespace splade_fast::cpu {
namespace {

constexpr int64_t kColumns = 64;  // vocabulary entries whose coefficients are computed at a time
// Slices of the dimensions. Long ones read whole stretches of the weight: with D = 768 and all pairs active, one slice
// and accumulators of 2 MiB take 19 ms; slices of 128 dimensions and accumulators of 512 KiB take 46 ms.
constexpr int64_t kMinSliceDim = 256, kMaxSliceDim = 1024;
constexpr int64_t kSliceBytes = int64_t{2} << 20;

// Coefficients c and argmax t of a block of vocabulary entries, for some sequences.
template <typename T, typename G>
class Pairs {
  using Acc = Accumulator<T>;

 public:
  Pairs(const Tensor& grad, const Tensor& max_logits, const Tensor& argmax, Activation activation,
        const SequenceRows& shape, int64_t sequences, PositionCheck& check)
      : grad_(grad),
        max_logits_(max_logits),
        argmax_(argmax),
        activation_(activation),
        shape_(shape),
        check_(check),
        coefficient_(sequences * kColumns),
        position_(sequences * kColumns) {}

  void load(int64_t first_sequence, int64_t sequences, int64_t first_column, int64_t columns) {
    for (int64_t b = 0; b < sequences; ++b) {
      const int64_t offset = (first_sequence + b) * grad_.size(1) + first_column;
      kernels<G>().coefficients(const_data<G>(grad_) + offset, const_data<Acc>(max_logits_) + offset, columns,
                                activation_, coefficient_.get() + b * kColumns);
      load_positions(argmax_, offset, position_.get() + b * kColumns, columns);
      for (int64_t i = b * kColumns; i < b * kColumns + columns; ++i) {
        Acc& coefficient = coefficient_.get()[i];
        if (coefficient != 0 && !check_.is_inside(position_.get()[i], shape_.rows[first_sequence + b])) coefficient = 0;
      }
    }
  }

  Acc coefficient(int64_t b, int64_t column) const { return coefficient_.get()[b * kColumns + column]; }
  int64_t position(int64_t b, int64_t column) const { return position_.get()[b * kColumns + column]; }

 private:
  const Tensor &grad_, &max_logits_, &argmax_;
  const Activation activation_;
  const SequenceRows& shape_;
  PositionCheck& check_;
  const Scratch<Acc> coefficient_;
  const Scratch<int64_t> position_;
};

template <typename T, typename G>
class Backward {
  using Acc = Accumulator<T>;

 public:
  Backward(const Tensor& grad, const Tensor& max_logits, const Tensor& argmax, const Tensor& hidden,
           const Tensor& weight, const SequenceRows& sequences, Activation activation)
      : grad_(grad),
        max_logits_(max_logits),
        argmax_(argmax),
        hidden_(const_data<T>(hidden)),
        weight_(const_data<T>(weight)),
        sequences_(sequences),
        activation_(activation),
        batch_(static_cast<int64_t>(sequences.start.size())),
        vocabulary_(weight.size(0)),
        dim_(weight.size(1)) {}

  void weight_and_bias(const HeadGradients& gradients) {
    const bool needs_weight = gradients.weight.numel() > 0, needs_bias = gradients.bias.numel() > 0;
    const int64_t blocks = ceil_div(vocabulary_, kColumns);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      Pairs<T, G> pairs(grad_, max_logits_, argmax_, activation_, sequences_, batch_, check_);
      const ActivePairs active(batch_);
      const Scratch<Acc> bias(kColumns);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kColumns, count = std::min(kColumns, vocabulary_ - first);
        pairs.load(0, batch_, first, count);
        for (int64_t column = 0; column < count; ++column) {
          T* target = needs_weight ? mutable_data<T>(gradients.weight) + (first + column) * dim_ : nullptr;
          bias.get()[column] = sum_column(pairs, column, active, target);
        }
        if (needs_bias) kernels<T>().store(mutable_data<T>(gradients.bias) + first, bias.get(), count);
      }
    });
    check_.check_all_inside();
  }

  void hidden(const HeadGradients& gradients) {
    const int64_t slice_dim = ceil_div(dim_, choose_slices()), slices = ceil_div(dim_, slice_dim);
    const std::vector<int64_t> groups = group_sequences(slice_dim, slices);
    const int64_t num_groups = static_cast<int64_t>(groups.size()) - 1;
    torch::stable::parallel_for(0, num_groups * slices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t group = item / slices, slice = (item % slices) * slice_dim;
        hidden_slice(gradients, groups[group], groups[group + 1], slice, std::min(slice_dim, dim_ - slice));
      }
    });
    check_.check_all_inside();
  }

 private:
  // The active pairs of a vocabulary entry.
  struct ActivePairs {
    explicit ActivePairs(int64_t batch) : coefficient(batch), token(batch) {}

    const Scratch<Acc> coefficient;
    const Scratch<const T*> token;  // row of hidden
  };

  // Return the sum of the coefficients c of a vocabulary entry. If target is given, store the sum of c * hidden[t]
  // there.
  Acc sum_column(const Pairs<T, G>& pairs, int64_t column, const ActivePairs& active, T* target) const {
    Acc sum = 0;
    int64_t count = 0;
    for (int64_t b = 0; b < batch_; ++b) {
      const Acc coefficient = pairs.coefficient(b, column);
      if (coefficient == 0) continue;
      sum += coefficient;
      active.coefficient.get()[count] = coefficient;
      active.token.get()[count++] = hidden_ + (sequences_.start[b] + pairs.position(b, column)) * dim_;
    }
    if (target) kernels<T>().combine(target, active.coefficient.get(), active.token.get(), count, dim_);
    return sum;
  }

  // Threads that share the dimensions read parts of the weight, and those that share the sequences all of it. The
  // number of slices divides that of the threads, so that all have work.
  int64_t choose_slices() const {
    const int64_t threads = torch::stable::get_num_threads();
    int64_t slices = std::max<int64_t>(std::min(dim_ / kMinSliceDim, threads), 1);
    while (threads % slices != 0) --slices;
    return std::max(slices, ceil_div(dim_, kMaxSliceDim));
  }

  // Return the bounds of groups of sequences. Each group reads the weight once, the accumulators of a group fit into
  // kSliceBytes, and there are enough groups and slices for all threads.
  std::vector<int64_t> group_sequences(int64_t slice_dim, int64_t slices) const {
    const int64_t bytes_per_row = std::max<int64_t>(slice_dim, 1) * static_cast<int64_t>(sizeof(Acc));
    const int64_t all_rows = std::accumulate(sequences_.rows.begin(), sequences_.rows.end(), int64_t{0});
    const int64_t items_per_slice = ceil_div(torch::stable::get_num_threads(), slices);
    const int64_t max_rows = std::min(kSliceBytes / bytes_per_row, ceil_div(all_rows, items_per_slice));
    std::vector<int64_t> bounds{0};
    int64_t rows = 0;
    for (int64_t b = 0; b < batch_; ++b) {
      if (b > bounds.back() && rows + sequences_.rows[b] > max_rows) {
        bounds.push_back(b);
        rows = 0;
      }
      rows += sequences_.rows[b];
    }
    bounds.push_back(batch_);
    return bounds;
  }

  void hidden_slice(const HeadGradients& gradients, int64_t first_sequence, int64_t last_sequence, int64_t slice,
                    int64_t dim) {
    const int64_t sequences = last_sequence - first_sequence;
    const int64_t first_row = sequences_.start[first_sequence];
    int64_t rows = 0;
    for (int64_t b = first_sequence; b < last_sequence; ++b) rows += sequences_.rows[b];
    const Scratch<Acc> sum(rows * dim);
    std::fill_n(sum.get(), rows * dim, Acc(0));
    Pairs<T, G> pairs(grad_, max_logits_, argmax_, activation_, sequences_, sequences, check_);
    for (int64_t first = 0; first < vocabulary_; first += kColumns) {
      const int64_t count = std::min(kColumns, vocabulary_ - first);
      pairs.load(first_sequence, sequences, first, count);
      for (int64_t column = 0; column < count; ++column) {
        const T* weight = weight_ + (first + column) * dim_ + slice;
        for (int64_t b = 0; b < sequences; ++b) {
          const Acc coefficient = pairs.coefficient(b, column);
          if (coefficient == 0) continue;
          const int64_t row = sequences_.start[first_sequence + b] + pairs.position(b, column) - first_row;
          kernels<T>().axpy(sum.get() + row * dim, coefficient, weight, dim);
        }
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      kernels<T>().store(mutable_data<T>(gradients.hidden) + (first_row + row) * dim_ + slice, sum.get() + row * dim,
                         dim);
    }
  }

  const Tensor &grad_, &max_logits_, &argmax_;
  const T *hidden_, *weight_;
  const SequenceRows& sequences_;
  const Activation activation_;
  const int64_t batch_, vocabulary_, dim_;
  PositionCheck check_;
};

}  // namespace

void head_backward_max(const Tensor& grad, const Tensor& max_logits, const Tensor& argmax, const Tensor& hidden,
                       const Tensor& weight, const SequenceRows& sequences, Activation activation,
                       const HeadGradients& gradients) {
  dispatch_floating(hidden.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto&& backward) {
      if (gradients.weight.numel() > 0 || gradients.bias.numel() > 0) backward.weight_and_bias(gradients);
      if (gradients.hidden.numel() > 0) backward.hidden(gradients);
    };
    if (grad.scalar_type() == hidden.scalar_type()) {
      run(Backward<T, T>(grad, max_logits, argmax, hidden, weight, sequences, activation));
    } else {
      run(Backward<T, Accumulator<T>>(grad, max_logits, argmax, hidden, weight, sequences, activation));
    }
  });
}

}  // namespace splade_fast::cpu
