// pool on CUDA: logits (B, L, V) -> pooled (B, V).
//
// Memory bounds the kernel: it reads every logit of a real token once and writes each gradient once. A thread owns a
// few neighbouring columns and keeps their running result in registers while it walks over the rows. Where there are
// too few columns to fill the device, several threads of a block share the rows of a sequence.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/pool.h"

namespace splade_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kThreadsPerMultiprocessor = 2048;  // enough to fill a device
constexpr int kMinRows = 4;                          // in a slice
constexpr int kMinSliceBytes = 128;                  // of a row, read by a slice at once

// Whether the candidate replaces the maximum: NaN does and then stays, as in torch.max; of equals the earlier stays.
template <typename Acc>
__device__ bool beats(Acc candidate, Acc value) {
  return !(candidate <= value) && value == value;
}

template <typename Acc>
__device__ Acc lowest() {
  return -static_cast<Acc>(INFINITY);
}

// The running result of the columns of one thread.
template <typename T, int kVec, Pooling kPooling>
struct ColumnState {
  using Acc = Accumulator<T>;

  Acc value[kVec];
  int32_t position[kVec];  // max pooling
  Acc bias[kVec];          // sum pooling: the activation is not linear, so the bias comes before it

  __device__ void start(const PoolTask& task, int64_t column) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if constexpr (kPooling == Pooling::kMax) {
        value[i] = lowest<Acc>();
        position[i] = 0;
      } else {
        value[i] = Acc(0);
        const bool has_bias = task.bias != nullptr && column + i < task.columns;
        bias[i] = has_bias ? to_acc(static_cast<const T*>(task.bias)[column + i]) : Acc(0);
      }
    }
  }

  __device__ void add(const Vector<T, kVec>& logits, int32_t row, Activation activation) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const Acc logit = to_acc(logits.element[i]);
      if constexpr (kPooling == Pooling::kMax) {
        const bool better = beats(logit, value[i]);
        value[i] = better ? logit : value[i];
        position[i] = better ? row : position[i];
      } else {
        // Most logits of a trained model are not positive and skip the logarithm.
        const Acc biased = logit + bias[i];
        if (!(biased <= Acc(0))) value[i] += activate(biased, activation);
      }
    }
  }
};

// The running maximum of the columns of one thread in types of two bytes: two columns to an instruction. It covers few
// enough rows for positions of 16 bits.
template <typename T>
struct PairOf {};
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using type = __half2;
};

template <typename T, int kVec>
struct PackedMaximum {
  using Pair = typename PairOf<T>::type;
  static constexpr int kMaxRows = 1 << 15;

  struct Pairs {
    Pair pair[kVec / 2];
  };
  Pairs value;
  uint32_t position[kVec / 2];

  __device__ PackedMaximum() {
    const T lowest = from_acc<T>(-INFINITY);
#pragma unroll
    for (int p = 0; p < kVec / 2; ++p) {
      value.pair[p] = Pair{lowest, lowest};
      position[p] = 0;
    }
  }

  // Of equal values the earlier row stays. NaN stays too, but its row is not noted.
  __device__ void add(const Vector<T, kVec>& logits, int row) {
    const Pairs candidate = bit_cast<Pairs>(logits);
    const uint32_t rows = static_cast<uint32_t>(row) * 0x10001u;
#pragma unroll
    for (int p = 0; p < kVec / 2; ++p) {
      const uint32_t better = __hgt2_mask(candidate.pair[p], value.pair[p]);
      position[p] = (position[p] & ~better) | (rows & better);
      value.pair[p] = __hmax2_nan(candidate.pair[p], value.pair[p]);
    }
  }

  // Merges the maxima into those of earlier rows. find_nan(i) returns the row of the first NaN of column i.
  template <typename State, typename FindNan>
  __device__ void merge_into(State& state, int32_t first_position, const FindNan& find_nan) const {
    const Vector<T, kVec> values = bit_cast<Vector<T, kVec>>(value);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float candidate = to_acc(values.element[i]);
      if (!beats(candidate, state.value[i])) continue;
      const int row = candidate == candidate ? static_cast<int>(position[i / 2] >> 16 * (i % 2) & 0xffff) : find_nan(i);
      state.value[i] = candidate;
      state.position[i] = first_position + row;
    }
  }
};

// Stores a finished entry.
template <typename T, Pooling kPooling>
__device__ void store_result(const PoolTask& task, int64_t b, int64_t column, Accumulator<T> value, int32_t position,
                             bool has_real_row) {
  if constexpr (kPooling == Pooling::kSum) {
    store_either<T>(task.pooled, task.pooled_in_acc, b * task.vocabulary + column, value);
  } else {
    store_maximum<T>(task, b, column, value, position, has_real_row);
  }
}

// A block reduces `lanes` * kVec columns of one sequence, in kThreads / lanes slices of its rows.
template <typename T, int kVec, Pooling kPooling>
__global__ void __launch_bounds__(kThreads) pool_kernel(const PoolTask task, int lanes, int64_t tiles) {
  using Acc = Accumulator<T>;
  constexpr bool kMax = kPooling == Pooling::kMax;
  // Loads in flight per thread. The compiler inlines the logarithms of the sum for each of them.
  constexpr int kUnroll = kVec * sizeof(T) >= kVectorBytes || !kMax ? 4 : 8;
  __shared__ alignas(16) Acc values[kThreads * kVec];
  __shared__ alignas(16) int32_t positions[kMax ? kThreads * kVec : 1];

  const int64_t b = task.first_sequence + blockIdx.x / tiles;
  const int tile = lanes * kVec;
  const int64_t first = blockIdx.x % tiles * tile;
  const Span whole = sequence_span(task.sequences, b);
  const bool empty = whole.start >= whole.stop;
  const int64_t begin = max(whole.start, task.first_row), end = min(whole.stop, task.end_row);
  // An empty sequence has no rows anywhere: the first block of rows finishes it.
  if (empty ? task.first_row > 0 : begin >= end) return;

  const int slices = kThreads / lanes, slice = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const int64_t column = first + lane * kVec;
  ColumnState<T, kVec, kPooling> state;
  state.start(task, column);
  bool has_real_row = false;
  if (column < task.columns && !empty) {
    const int64_t per_slice = (end - begin + slices - 1) / slices;
    const int64_t from = begin + slice * per_slice;
    const int rows = static_cast<int>(max(min(end - from, per_slice), int64_t{0}));
    const int32_t first_position = static_cast<int32_t>(from - whole.start);
    const int64_t offset = task.sequences.starts != nullptr ? whole.start * task.row_stride : b * task.sequence_stride;
    const T* source =
        static_cast<const T*>(task.logits) + offset + (first_position - task.first_row) * task.row_stride + column;
    const bool* mask = task.mask != nullptr ? task.mask + from : nullptr;
    // Calls use(logits, row) for the real rows [first_row, stop).
    const auto for_each_row = [&](int first_row, int stop, const auto& use) {
      const T* from = source + first_row * task.row_stride;
      for (int row = first_row; row < stop; row += kUnroll, from += kUnroll * task.row_stride) {
        bool is_real[kUnroll];
        Vector<T, kVec> logits[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) is_real[i] = row + i < stop && (mask == nullptr || mask[row + i]);
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
          if (is_real[i]) logits[i] = load_vector<kVec>(from + i * task.row_stride);
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
          if (is_real[i]) use(logits[i], row + i);
          has_real_row |= is_real[i];
        }
      }
    };
    if constexpr (kMax && sizeof(T) == 2 && kVec % 2 == 0) {
      using Maximum = PackedMaximum<T, kVec>;
      for (int first_row = 0; first_row < rows; first_row += Maximum::kMaxRows) {
        Maximum maximum;
        for_each_row(first_row, min(rows, first_row + Maximum::kMaxRows),
                     [&](const Vector<T, kVec>& logits, int row) { maximum.add(logits, row - first_row); });
        maximum.merge_into(state, first_position + first_row, [&](int i) {
          int row = first_row;
          const auto is_nan = [&](float value) { return value != value; };
          while ((mask != nullptr && !mask[row]) || !is_nan(to_acc(source[row * task.row_stride + i]))) ++row;
          return row - first_row;
        });
      }
    } else {
      for_each_row(0, rows, [&](const Vector<T, kVec>& logits, int row) {
        state.add(logits, first_position + row, task.activation);
      });
    }
  }

#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const int slot = slice * tile + lane * kVec + i;
    values[slot] = state.value[i];
    if constexpr (kMax) positions[slot] = state.position[i];
  }
  has_real_row = __syncthreads_or(has_real_row);

  // Merges the slices in the order of their rows: ties go to the lowest row, NaN to the first.
  const bool opens = empty || whole.start >= task.first_row, closes = empty || whole.stop <= task.end_row;
  for (int c = threadIdx.x; c < tile && first + c < task.columns; c += kThreads) {
    Acc value = kMax ? lowest<Acc>() : Acc(0);
    int32_t position = 0;
    bool any = has_real_row;
    if (!opens) {
      value = static_cast<const Acc*>(task.carry_in.value)[first + c];
      if constexpr (kMax) {
        position = task.carry_in.position[first + c];
        any |= position >= 0;
        position = max(position, 0);
      }
    }
    for (int s = 0; s < slices; ++s) {
      const Acc candidate = values[s * tile + c];
      if constexpr (kMax) {
        if (beats(candidate, value)) {
          value = candidate;
          position = positions[s * tile + c];
        }
      } else {
        value += candidate;
      }
    }
    if (closes) {
      store_result<T, kPooling>(task, b, first + c, value, position, any);
    } else {
      static_cast<Acc*>(task.carry_out.value)[first + c] = value;
      if constexpr (kMax) task.carry_out.position[first + c] = any ? position : -1;
    }
  }
}

// The fewest slices that fill the device, each with some rows to read.
int choose_lanes(const PoolTask& task, int vector_bytes, int64_t vectors, int64_t multiprocessors) {
  const int64_t rows = (task.end_row - task.first_row) / task.num_sequences;
  int lanes = kThreads;
  while (lanes / 2 * vector_bytes >= kMinSliceBytes && rows * lanes >= 2 * kMinRows * kThreads &&
         task.num_sequences * vectors * kThreads < multiprocessors * kThreadsPerMultiprocessor * lanes) {
    lanes /= 2;
  }
  return lanes;
}

template <typename T, int kVec, Pooling kPooling>
void launch_pool(const PoolTask& task, const OnDevice& device) {
  const int64_t vectors = ceil_div(task.columns, kVec);
  const int lanes = choose_lanes(task, kVec * sizeof(T), vectors, device.multiprocessors());
  const int64_t tiles = ceil_div(vectors, lanes);
  const unsigned blocks = grid_size(task.num_sequences * tiles);
  pool_kernel<T, kVec, kPooling><<<blocks, kThreads, 0, device.stream()>>>(task, lanes, tiles);
}

// Threads of the elementwise kernels: each owns kVec columns of one sequence and walks over some of its rows.
struct Walk {
  int64_t tiles, splits, rows_per_split;

  Walk(int64_t batch, int64_t length, int64_t vectors, int64_t multiprocessors) {
    constexpr int64_t kRows = 16;  // to amortise the work done once per column
    tiles = ceil_div(vectors, kThreads);
    const int64_t wanted = ceil_div(2 * multiprocessors * kThreadsPerMultiprocessor, batch * tiles * kThreads);
    splits = std::max<int64_t>(std::min(wanted, length / kRows), 1);
    rows_per_split = ceil_div(length, splits);
    splits = ceil_div(length, rows_per_split);
  }

  int64_t blocks(int64_t batch) const { return batch * splits * tiles; }
};

// The place of a thread: block = (b * splits + split) * tiles + tile.
template <int kVec>
struct Place {
  int64_t b, column, first_row, last_row;

  __device__ Place(const Walk& walk, int64_t length) {
    const int64_t block = blockIdx.x, rest = block / walk.tiles;
    column = (block % walk.tiles * kThreads + threadIdx.x) * kVec;
    b = rest / walk.splits;
    first_row = rest % walk.splits * walk.rows_per_split;
    last_row = min(first_row + walk.rows_per_split, length);
  }
};

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    pool_backward_max_kernel(const T* grad, const Accumulator<T>* max_logits, const void* positions, int position_bytes,
                             Activation activation, T* grad_logits, int64_t length, int64_t vocabulary, Walk walk) {
  const Place<kVec> place(walk, length);
  if (place.column >= vocabulary) return;
  T value[kVec];
  int32_t position[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const int64_t index = place.b * vocabulary + place.column + i;
    value[i] = from_acc<T>(coefficient(to_acc(grad[index]), max_logits[index], activation));
    position[i] = load_position(positions, position_bytes, index);
  }
  const T zero = from_acc<T>(0);
  T* target = grad_logits + (place.b * length + place.first_row) * vocabulary + place.column;
  const int32_t last = static_cast<int32_t>(place.last_row);
#pragma unroll 4
  for (int32_t row = static_cast<int32_t>(place.first_row); row < last; ++row, target += vocabulary) {
    Vector<T, kVec> out;
#pragma unroll
    for (int i = 0; i < kVec; ++i) out.element[i] = position[i] == row ? value[i] : zero;
    store_vector(target, out);
  }
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    pool_backward_sum_kernel(const T* grad, const T* logits, int64_t sequence_stride, int64_t row_stride,
                             const bool* mask, Activation activation, T* grad_logits, int64_t length,
                             int64_t vocabulary, Walk walk) {
  using Acc = Accumulator<T>;
  const Place<kVec> place(walk, length);
  if (place.column >= vocabulary) return;
  Acc incoming[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) incoming[i] = to_acc(grad[place.b * vocabulary + place.column + i]);
  const int64_t first = place.b * length + place.first_row;
  const T* source = logits + place.b * sequence_stride + place.first_row * row_stride + place.column;
  T* target = grad_logits + first * vocabulary + place.column;
  const int rows = static_cast<int>(place.last_row - place.first_row);
#pragma unroll 4
  for (int row = 0; row < rows; ++row, source += row_stride, target += vocabulary) {
    const bool is_real = mask == nullptr || mask[first + row];
    Vector<T, kVec> out, logit;
    if (is_real) logit = load_vector<kVec>(source);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const Acc gradient = is_real ? coefficient(incoming[i], to_acc(logit.element[i]), activation) : Acc(0);
      out.element[i] = from_acc<T>(gradient);
    }
    store_vector(target, out);
  }
}

// Host functions -------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> pool_forward(const Tensor& logits, const std::optional<Tensor>& mask,
                                                int64_t pooling_code, int64_t activation_code, bool save) {
  const char* op = "pool_forward";
  const Pooling pooling = check_pooling(pooling_code);
  const Activation activation = check_activation(activation_code);
  check_floating("logits", logits, 3);
  const int64_t batch = logits.size(0), length = logits.size(1), vocabulary = logits.size(2);
  check_mask(mask, logits, batch, length);
  const OnDevice device(logits, op);
  const ScalarType dtype = logits.scalar_type();
  const bool saved = save && pooling == Pooling::kMax;
  const std::vector<int64_t> shape{batch, vocabulary}, none{0};
  const Tensor pooled = new_tensor(logits, shape);
  const Tensor max_logits = new_tensor(logits, saved ? shape : none, accumulation_type(dtype));
  const Tensor argmax = new_tensor(logits, saved ? shape : none, position_type(length));
  if (pooled.numel() == 0) return {pooled, max_logits, argmax};
  const Tensor dense = contiguous_rows(logits);
  const std::optional<Tensor> dense_mask = contiguous_or_none(mask);
  PoolTask task{};
  task.logits = dense.const_data_ptr();
  task.sequence_stride = dense.stride(0);
  task.row_stride = dense.stride(1);
  task.columns = task.readable = task.vocabulary = vocabulary;
  task.end_row = batch * length;
  task.sequences = {nullptr, length, batch * length};
  task.num_sequences = batch;
  task.mask = dense_mask ? const_data<bool>(*dense_mask) : nullptr;
  task.activation = activation;
  task.pooled = pooled.mutable_data_ptr();
  task.max_logits = saved ? max_logits.mutable_data_ptr() : nullptr;
  task.positions = saved ? argmax.mutable_data_ptr() : nullptr;
  task.position_bytes = static_cast<int>(argmax.element_size());
  pool_rows(task, dtype, pooling, device, op);
  return {pooled, max_logits, argmax};
}

Tensor pool_backward_max(const Tensor& grad, const Tensor& max_logits, const Tensor& argmax, int64_t length,
                         int64_t activation_code) {
  const char* op = "pool_backward_max";
  const Activation activation = check_activation(activation_code);
  check_floating("grad", grad, 2);
  STD_TORCH_CHECK(length >= 0, "length must not be negative, got ", length);
  const int64_t batch = grad.size(0), vocabulary = grad.size(1);
  check_saved(grad, max_logits, argmax, batch, vocabulary, position_type(length));
  const OnDevice device(grad, op);
  const Tensor grad_logits = new_tensor(grad, std::vector<int64_t>{batch, length, vocabulary});
  if (grad_logits.numel() == 0) return grad_logits;
  const Tensor dense = as_contiguous(grad);
  dispatch_floating(grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* target = mutable_data<T>(grad_logits);
    dispatch_vector<T>(address_in_elements(target, sizeof(T)) | vocabulary, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      const Walk walk(batch, length, vocabulary / kVec, device.multiprocessors());
      pool_backward_max_kernel<T, kVec><<<grid_size(walk.blocks(batch)), kThreads, 0, device.stream()>>>(
          const_data<T>(dense), const_data<Accumulator<T>>(max_logits), argmax.const_data_ptr(),
          static_cast<int>(argmax.element_size()), activation, target, length, vocabulary, walk);
    });
  });
  check_launch(op);
  return grad_logits;
}

Tensor pool_backward_sum(const Tensor& grad, const Tensor& logits, const std::optional<Tensor>& mask,
                         int64_t activation_code) {
  const char* op = "pool_backward_sum";
  const Activation activation = check_activation(activation_code);
  check_floating("logits", logits, 3);
  check_floating("grad", grad, 2);
  check_same("grad", grad, "logits", logits);
  const int64_t batch = logits.size(0), length = logits.size(1), vocabulary = logits.size(2);
  check_size("grad", grad, 0, batch);
  check_size("grad", grad, 1, vocabulary);
  check_mask(mask, logits, batch, length);
  const OnDevice device(logits, op);
  const Tensor grad_logits = new_tensor(logits, std::vector<int64_t>{batch, length, vocabulary});
  if (grad_logits.numel() == 0) return grad_logits;
  const Tensor dense = contiguous_rows(logits), dense_grad = as_contiguous(grad);
  const std::optional<Tensor> dense_mask = contiguous_or_none(mask);
  dispatch_floating(logits.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = const_data<T>(dense);
    T* target = mutable_data<T>(grad_logits);
    const int64_t all = address_in_elements(source, sizeof(T)) | address_in_elements(target, sizeof(T)) |
                        dense.stride(0) | dense.stride(1) | vocabulary;
    dispatch_vector<T>(all, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      const Walk walk(batch, length, vocabulary / kVec, device.multiprocessors());
      pool_backward_sum_kernel<T, kVec><<<grid_size(walk.blocks(batch)), kThreads, 0, device.stream()>>>(
          const_data<T>(dense_grad), source, dense.stride(0), dense.stride(1),
          dense_mask ? const_data<bool>(*dense_mask) : nullptr, activation, target, length, vocabulary, walk);
    });
  });
  check_launch(op);
  return grad_logits;
}

}  // namespace

void pool_rows(const PoolTask& task, ScalarType dtype, Pooling pooling, const OnDevice& device, const char* op) {
  if (task.columns == 0 || task.num_sequences == 0) return;
  dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t all =
        address_in_elements(task.logits, sizeof(T)) | task.sequence_stride | task.row_stride | task.readable;
    dispatch_vector<T>(all, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      if (pooling == Pooling::kMax) {
        launch_pool<T, kVec, Pooling::kMax>(task, device);
      } else {
        launch_pool<T, kVec, Pooling::kSum>(task, device);
      }
    });
  });
  check_launch(op);
}

}  // namespace splade_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CUDA, m) {
  m.impl("pool_forward", TORCH_BOX(&splade_fast::cuda::pool_forward));
  m.impl("pool_backward_max", TORCH_BOX(&splade_fast::cuda::pool_backward_max));
  m.impl("pool_backward_sum", TORCH_BOX(&splade_fast::cuda::pool_backward_sum));
}
