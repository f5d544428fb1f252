// pool on the CPU: logits (B, L, V) to pooled (B, V).
//
// The ops are bound by memory. The logits of real tokens are read once, in strips of columns whose running result stays
// in the second-level cache. The backward of max pooling writes each gradient row once.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/positions.h"
#include "cpu/sequences.h"
#include "cpu/simd/kernels.h"

namespace splade_fast::cpu {
namespace {

constexpr int64_t kStrip = 8192;  // columns of a strip: their running values and positions take 64 KiB

struct Strips {
  int64_t vocabulary;
  int64_t per_row = ceil_div(vocabulary, kStrip);

  int64_t first(int64_t strip) const { return (strip % per_row) * kStrip; }
  int64_t count(int64_t strip) const { return std::min(kStrip, vocabulary - first(strip)); }
  int64_t batch(int64_t strip) const { return strip / per_row; }
};

template <typename T>
void forward(const Tensor& logits, const Sequences& sequences, Pooling pooling, Activation activation,
             const Tensor& pooled, const Tensor& max_logits, const Tensor& argmax) {
  using Acc = Accumulator<T>;
  const bool save = max_logits.numel() > 0;
  const int64_t vocabulary = logits.size(2);
  const T* base = const_data<T>(logits);
  const Strips strips{vocabulary};
  torch::stable::parallel_for(0, sequences.batch() * strips.per_row, 1, [&](int64_t begin, int64_t end) {
    const Kernels<T>& kernel = kernels<T>();
    const Scratch<Acc> value(kStrip);
    const Scratch<Position<Acc>> position(kStrip);
    std::vector<const T*> rows;
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t b = strips.batch(strip), first = strips.first(strip), count = strips.count(strip);
      const int64_t offset = b * vocabulary + first, tokens = sequences.length(b);
      T* out = mutable_data<T>(pooled) + offset;
      rows.clear();
      for (int64_t t = sequences.offset[b]; t < sequences.offset[b + 1]; ++t) {
        rows.push_back(base + b * logits.stride(0) + sequences.position[t] * logits.stride(1) + first);
      }
      if (pooling == Pooling::kSum) {
        std::fill_n(value.get(), kStrip, Acc(0));
        kernel.pool_sum(rows.data(), tokens, count, activation, value.get());
        kernel.store(out, value.get(), count);
        continue;
      }
      std::fill_n(value.get(), kStrip, -std::numeric_limits<Acc>::infinity());
      std::fill_n(position.get(), kStrip, Position<Acc>(0));
      kernel.pool_max(rows.data(), sequences.position.data() + sequences.offset[b], tokens, count, value.get(),
                      save ? position.get() : nullptr);
      kernel.activate_logits(value.get(), nullptr, count, activation, out);
      if (save) {
        std::copy_n(value.get(), count, mutable_data<Acc>(max_logits) + offset);
        store_positions(argmax, offset, position.get(), count);
      }
    }
  });
}

template <typename T>
void backward_max(const Tensor& grad, const Tensor& max_logits, const Tensor& argmax, Activation activation,
                  const Tensor& grad_logits) {
  using Acc = Accumulator<T>;
  const int64_t length = grad_logits.size(1), vocabulary = grad_logits.size(2);
  const Strips strips{vocabulary};
  PositionCheck check;
  torch::stable::parallel_for(0, grad.size(0) * strips.per_row, 1, [&](int64_t begin, int64_t end) {
    const Kernels<T>& kernel = kernels<T>();
    const Scratch<Acc> coefficient(kStrip);
    const Scratch<T> stored(kStrip);
    const Scratch<int64_t> position(kStrip);
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t b = strips.batch(strip), first = strips.first(strip), count = strips.count(strip);
      const int64_t offset = b * vocabulary + first;
      T* target = mutable_data<T>(grad_logits) + b * length * vocabulary + first;
      for (int64_t l = 0; l < length; ++l) std::memset(target + l * vocabulary, 0, count * sizeof(T));
      kernel.coefficients(const_data<T>(grad) + offset, const_data<Acc>(max_logits) + offset, count, activation,
                          coefficient.get());
      kernel.store(stored.get(), coefficient.get(), count);
      load_positions(argmax, offset, position.get(), count);
      for (int64_t v = 0; v < count; ++v) {
        const int64_t l = position.get()[v];
        if (coefficient.get()[v] != 0 && check.is_inside(l, length)) target[l * vocabulary + v] = stored.get()[v];
      }
    }
  });
  check.check_all_inside();
}

template <typename T>
void backward_sum(const Tensor& grad, const Tensor& logits, const std::optional<Tensor>& mask, Activation activation,
                  const Tensor& grad_logits) {
  const int64_t length = logits.size(1), vocabulary = logits.size(2);
  const bool* attention_mask = mask ? const_data<bool>(*mask) : nullptr;
  torch::stable::parallel_for(0, logits.size(0) * length, 1, [&](int64_t begin, int64_t end) {
    const Kernels<T>& kernel = kernels<T>();
    for (int64_t row = begin; row < end; ++row) {
      T* target = mutable_data<T>(grad_logits) + row * vocabulary;
      if (attention_mask && !attention_mask[row]) {
        std::memset(target, 0, vocabulary * sizeof(T));
      } else {
        const int64_t b = row / length, l = row % length;
        kernel.sum_gradient(const_data<T>(grad) + b * vocabulary,
                            const_data<T>(logits) + b * logits.stride(0) + l * logits.stride(1), vocabulary, activation,
                            target);
      }
    }
  });
}

// Ops -----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> pool_forward(const Tensor& logits, const std::optional<Tensor>& mask,
                                                int64_t pooling_code, int64_t activation_code, bool save) {
  const Pooling pooling = check_pooling(pooling_code);
  const Activation activation = check_activation(activation_code);
  check_floating("logits", logits, 3);
  const int64_t batch = logits.size(0), length = logits.size(1), vocabulary = logits.size(2);
  check_mask(mask, logits, batch, length);
  const ScalarType dtype = logits.scalar_type();
  const bool saved = save && pooling == Pooling::kMax;
  const std::vector<int64_t> shape{batch, vocabulary}, none{0};
  Tensor pooled = new_tensor(logits, shape);
  Tensor max_logits = new_tensor(logits, saved ? shape : none, accumulation_type(dtype));
  Tensor argmax = new_tensor(logits, saved ? shape : none, position_type(length));
  const Tensor dense = contiguous_rows(logits);
  const Sequences sequences = padded_sequences(batch, length, mask);
  dispatch_floating(dtype, [&](auto type) {
    forward<typename decltype(type)::type>(dense, sequences, pooling, activation, pooled, max_logits, argmax);
  });
  return {pooled, max_logits, argmax};
}

Tensor pool_backward_max(const Tensor& grad, const Tensor& max_logits, const Tensor& argmax, int64_t length,
                         int64_t activation_code) {
  const Activation activation = check_activation(activation_code);
  check_floating("grad", grad, 2);
  STD_TORCH_CHECK(length >= 0, "length must not be negative, got ", length);
  check_saved(grad, max_logits, argmax, grad.size(0), grad.size(1), position_type(length));
  Tensor grad_logits = new_tensor(grad, std::vector<int64_t>{grad.size(0), length, grad.size(1)});
  if (grad_logits.numel() == 0) return grad_logits;
  prefer_huge_pages(grad_logits);
  const Tensor dense = as_contiguous(grad);
  dispatch_floating(grad.scalar_type(), [&](auto type) {
    backward_max<typename decltype(type)::type>(dense, max_logits, argmax, activation, grad_logits);
  });
  return grad_logits;
}

Tensor pool_backward_sum(const Tensor& grad, const Tensor& logits, const std::optional<Tensor>& mask,
                         int64_t activation_code) {
  const Activation activation = check_activation(activation_code);
  check_floating("logits", logits, 3);
  check_floating("grad", grad, 2);
  check_same("grad", grad, "logits", logits);
  check_size("grad", grad, 0, logits.size(0));
  check_size("grad", grad, 1, logits.size(2));
  check_mask(mask, logits, logits.size(0), logits.size(1));
  const Tensor dense = contiguous_rows(logits), dense_grad = as_contiguous(grad);
  const std::optional<Tensor> dense_mask = contiguous_or_none(mask);
  Tensor grad_logits = new_tensor(dense, logits.sizes());
  if (grad_logits.numel() == 0) return grad_logits;
  prefer_huge_pages(grad_logits);
  dispatch_floating(dense.scalar_type(), [&](auto type) {
    backward_sum<typename decltype(type)::type>(dense_grad, dense, dense_mask, activation, grad_logits);
  });
  return grad_logits;
}

}  // namespace
}  // namespace splade_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CPU, m) {
  m.impl("pool_forward", TORCH_BOX(&splade_fast::cpu::pool_forward));
  m.impl("pool_backward_max", TORCH_BOX(&splade_fast::cpu::pool_backward_max));
  m.impl("pool_backward_sum", TORCH_BOX(&splade_fast::cpu::pool_backward_sum));
}
