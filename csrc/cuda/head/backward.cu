// head backward on CUDA.
//
// max: only active pairs (b, v), pooled value > 0 and gradient != 0, do work. With t the argmax and
// c = grad * activation'(logit),
//   grad_weight[v] = sum over b of c * hidden[t],  grad_bias[v] = sum over b of c,
//   grad_hidden[t] = sum over v of c * weight[v].
// For grad_hidden the pairs of a sequence are first sorted by position, stably, so that those of a token are
// adjacent: count per (slice of the vocabulary, token), scan, place. One warp or block owns each row of a gradient
// and adds in an order that depends on the pairs only: no floating-point atomics, the same bits every time.
//
// sum: see common/head_sum_backward.h.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/head_sum_backward.h"
#include "cuda/block.cuh"
#include "cuda/head/head.h"

namespace splade_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Active pairs ---------------------------------------------------------------------------------------------------

template <typename Acc>
struct Pair {
  Acc coefficient;  // 0: not active
  int32_t position;
};

template <typename T>
struct Pairs {
  using Acc = Accumulator<T>;

  const void* grad;  // (B, V) in the type of hidden or the accumulation type
  bool grad_in_acc;
  const Acc* max_logits;
  const void* positions;
  int position_bytes;
  Activation activation;
  int64_t batch, vocabulary;
  Sequences sequences;

  __device__ Pair<Acc> load(int64_t b, int64_t v, const Span& span) const {
    const int64_t index = b * vocabulary + v;
    const Acc logit = max_logits[index];
    if (logit <= Acc(0)) return {Acc(0), 0};  // most pairs of a trained model
    const Acc gradient = load_either<T>(grad, grad_in_acc, index);
    return pair(logit, gradient, load_position(positions, position_bytes, index), span);
  }

  // The pairs of the entries first + kWarp * g + lane < end, by a whole warp. Loads are in flight together: they read
  // the last entry behind the end, and an entry whose logit is not positive only where another one's is.
  template <int kGroups>
  __device__ void load_groups(int64_t b, int64_t first, int64_t end, const Span& span,
                              Pair<Acc> (&loaded)[kGroups]) const {
    const int64_t row = b * vocabulary;
    int64_t index[kGroups];
    Acc logit[kGroups], gradient[kGroups];
    int32_t position[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      index[g] = row + min(first + g * kWarp + threadIdx.x % kWarp, end - 1);
      logit[g] = max_logits[index[g]];
    }
    bool is_active = false;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      loaded[g] = {Acc(0), 0};
      is_active |= !(logit[g] <= Acc(0));
    }
    if (!__any_sync(kAllLanes, is_active)) return;
    const auto load_all = [&](const auto* data, auto& target) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) target[g] = to_acc_or_int(data[index[g]]);
    };
    if (grad_in_acc) {
      load_all(static_cast<const Acc*>(grad), gradient);
    } else {
      load_all(static_cast<const T*>(grad), gradient);
    }
    if (position_bytes == 1) {
      load_all(static_cast<const uint8_t*>(positions), position);
    } else if (position_bytes == 2) {
      load_all(static_cast<const int16_t*>(positions), position);
    } else {
      load_all(static_cast<const int32_t*>(positions), position);
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const bool inside = first + g * kWarp + threadIdx.x % kWarp < end;
      if (inside) loaded[g] = pair(logit[g], gradient[g], position[g], span);
    }
  }

 private:
  __device__ Pair<Acc> pair(Acc logit, Acc gradient, int32_t position, const Span& span) const {
    // A position of other cu_seqlens than the forward's must not reach outside of the sequence.
    const bool inside = position >= 0 && position < span.stop - span.start;
    return {inside ? coefficient(gradient, logit, activation) : Acc(0), position};
  }

  template <typename Value>
  __device__ static auto to_acc_or_int(Value value) {
    if constexpr (std::is_integral_v<Value>) {
      return static_cast<int32_t>(value);
    } else {
      return to_acc(value);
    }
  }
};

// Sums of scaled rows --------------------------------------------------------------------------------------------

// The sum of scaled rows in a warp, over kDims dimensions.
template <typename T, int kVec>
class RowSum {
  using Acc = Accumulator<T>;
  static constexpr int kAccumulators = sizeof(Acc) == 8 ? 16 : 32;  // per lane
  static constexpr int kParts = kVec == 1 ? 8 : kAccumulators / kVec;

 public:
  static constexpr int kDims = kWarp * kVec * kParts;
  static constexpr int kLoads = kParts;  // in flight per lane and row

  // dim: number of dimensions left from the first one on.
  __device__ RowSum(int lane, int64_t dim) : lane_(lane), dim_(static_cast<int>(min(dim, int64_t{kDims}))) { clear(); }

  __device__ void clear() {
    for_each([](Acc& sum, int) { sum = Acc(0); });
  }

  __device__ void add(Acc factor, const T* row) {
    Vector<T, kVec> parts[kParts];
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      if (first(p) < dim_) parts[p] = load_vector<kVec>(row + first(p));
    }
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      if (first(p) < dim_) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum_[p][i] += factor * to_acc(parts[p].element[i]);
      }
    }
  }

  __device__ void store(T* row) const {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      if (first(p) < dim_) {
        Vector<T, kVec> part;
#pragma unroll
        for (int i = 0; i < kVec; ++i) part.element[i] = from_acc<T>(sum_[p][i]);
        store_vector(row + first(p), part);
      }
    }
  }

  // Saves sums of kDims dimensions in shared memory; each lane has places of its own.
  __device__ void save(Acc* shared) {
    for_each([&](Acc& sum, int i) { shared[i * kWarp + lane_] = sum; });
  }

  __device__ void add_saved(const Acc* shared) {
    for_each([&](Acc& sum, int i) { sum += shared[i * kWarp + lane_]; });
  }

 private:
  __device__ int first(int part) const { return (part * kWarp + lane_) * kVec; }

  template <typename Body>
  __device__ void for_each(Body body) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) body(sum_[p][i], p * kVec + i);
    }
  }

  int lane_, dim_;
  Acc sum_[kParts][kVec];
};

// Calls body with the widest vector that the addresses and sizes allow, or with single elements.
template <typename T, typename Body>
void dispatch_rows(int64_t or_of_elements, Body body) {
  if (or_of_elements % kMaxVector<T> == 0) {
    body(Constant<kMaxVector<T>>{});
  } else {
    body(Constant<1>{});
  }
}

template <typename T>
int64_t address(const Tensor& tensor) {
  return address_in_elements(tensor.const_data_ptr(), sizeof(T));
}

// Gradient of weight and bias ------------------------------------------------------------------------------------

// A warp owns the row of one vocabulary entry; blockIdx.y is a tile of dimensions. Null: not needed.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    grad_weight_kernel(const Pairs<T> pairs, const T* hidden, T* grad_weight, T* grad_bias, int64_t dim) {
  using Acc = Accumulator<T>;
  // One more column than warps, so that lanes which read a column meet different banks.
  __shared__ Acc coefficients[kWarp][kWarps + 1];
  __shared__ int64_t tokens[kWarp][kWarps + 1];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int staged_sequence = threadIdx.x / kWarps, staged_entry = threadIdx.x % kWarps;
  const int64_t first_entry = static_cast<int64_t>(blockIdx.x) * kWarps, v = first_entry + warp;
  const int64_t first_dim = static_cast<int64_t>(blockIdx.y) * RowSum<T, kVec>::kDims;
  RowSum<T, kVec> sum(lane, dim - first_dim);
  Acc bias = Acc(0);
  for (int64_t first = 0; first < pairs.batch; first += kWarp) {
    // The pairs of kWarp sequences and the vocabulary entries of the block, read row by row.
    const int64_t b = first + staged_sequence;
    Acc staged = Acc(0);
    int64_t token = 0;
    if (b < pairs.batch && first_entry + staged_entry < pairs.vocabulary) {
      const Span span = sequence_span(pairs.sequences, b);
      const Pair<Acc> pair = pairs.load(b, first_entry + staged_entry, span);
      staged = pair.coefficient;
      token = span.start + pair.position;
    }
    coefficients[staged_sequence][staged_entry] = staged;
    tokens[staged_sequence][staged_entry] = token;
    __syncthreads();
    const Acc mine = coefficients[lane][warp];
    const int64_t my_token = tokens[lane][warp];
    for (unsigned active = __ballot_sync(kAllLanes, mine != Acc(0)); active != 0; active &= active - 1) {
      const int source = __ffs(static_cast<int>(active)) - 1;
      const Acc factor = __shfl_sync(kAllLanes, mine, source);
      const int64_t row = __shfl_sync(kAllLanes, my_token, source);
      bias += factor;
      if (grad_weight != nullptr) sum.add(factor, hidden + row * dim + first_dim);
    }
    __syncthreads();
  }
  if (v >= pairs.vocabulary) return;
  if (grad_weight != nullptr) sum.store(grad_weight + v * dim + first_dim);
  if (grad_bias != nullptr && blockIdx.y == 0 && lane == 0) grad_bias[v] = from_acc<T>(bias);
}

template <typename T>
void launch_grad_weight(const Pairs<T>& pairs, const HeadInput& input, const std::optional<Tensor>& grad_weight,
                        const std::optional<Tensor>& grad_bias, const OnDevice& device, const char* op) {
  const int64_t dim = input.dim();
  T* weight = grad_weight ? mutable_data<T>(*grad_weight) : nullptr;
  T* bias = grad_bias ? mutable_data<T>(*grad_bias) : nullptr;
  const int64_t all = dim | address<T>(input.tokens) | address_in_elements(weight, sizeof(T));
  dispatch_rows<T>(all, [&](auto vec) {
    constexpr int kVec = decltype(vec)::value;
    const int64_t dim_tiles = grad_weight ? std::max<int64_t>(ceil_div(dim, RowSum<T, kVec>::kDims), 1) : 1;
    const dim3 grid = grid_size(ceil_div(pairs.vocabulary, kWarps), dim_tiles);
    grad_weight_kernel<T, kVec>
        <<<grid, kThreads, 0, device.stream()>>>(pairs, const_data<T>(input.tokens), weight, bias, dim);
  });
  check_launch(op);
}

// Gradient of hidden: pairs sorted by position -------------------------------------------------------------------

// The pairs of some sequences, each sequence's by (position, vocabulary entry).
template <typename Acc>
struct Buckets {
  int64_t first_sequence, num_sequences;
  int slices;  // of the vocabulary: a warp each, so that one sequence has work for many
  int64_t slice_entries;
  // (slices, rows): number of pairs, then where they start, then where they end among the sequence's pairs.
  int32_t* offsets;
  // (num_sequences, V)
  int32_t* entry;
  Acc* coefficient;
};

// A warp walks over one slice of one sequence twice. It counts the pairs of each token first; once the counts have
// become offsets, it puts each pair in its place. One warp alone uses the offsets of a slice, so the pairs of a token
// stay in the order of their entries.
template <typename T, bool kPlace>
__global__ void __launch_bounds__(kThreads) bucket_kernel(const Pairs<T> pairs, const Buckets<Accumulator<T>> buckets) {
  using Acc = Accumulator<T>;
  constexpr int kGroups = 4;  // of kWarp entries, loaded together
  const int lane = threadIdx.x % kWarp;
  const int64_t work = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (work >= buckets.num_sequences * buckets.slices) return;
  const int64_t local = work / buckets.slices, slice = work % buckets.slices;
  const int64_t b = buckets.first_sequence + local;
  const Span span = sequence_span(pairs.sequences, b);
  int32_t* offsets = buckets.offsets + slice * pairs.sequences.rows + span.start;
  if constexpr (!kPlace) {
    for (int64_t i = lane; i < span.stop - span.start; i += kWarp) offsets[i] = 0;
    __syncwarp();
  }
  const int64_t begin = slice * buckets.slice_entries;
  const int64_t end = min(begin + buckets.slice_entries, pairs.vocabulary);
  for (int64_t first = begin; first < end; first += kGroups * kWarp) {
    Pair<Acc> loaded[kGroups];
    pairs.load_groups(b, first, end, span, loaded);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const Pair<Acc> pair = loaded[g];
      const bool active = pair.coefficient != Acc(0);
      if (!__any_sync(kAllLanes, active)) continue;
      // Lanes with the same position share one update of its offset.
      const unsigned peers = __match_any_sync(kAllLanes, active ? pair.position : -1);
      const int leader = __ffs(static_cast<int>(peers)) - 1;
      int32_t offset = 0;
      if (active && lane == leader) offset = atomicAdd(offsets + pair.position, __popc(peers));
      if constexpr (kPlace) {
        const int rank = __popc(peers & ((1u << lane) - 1));
        const int64_t place = static_cast<int64_t>(__shfl_sync(kAllLanes, offset, leader)) + rank;
        // False only where sequences overlap because cu_seqlens does not rise.
        if (active && place >= 0 && place < pairs.vocabulary) {
          buckets.entry[local * pairs.vocabulary + place] = static_cast<int32_t>(first + g * kWarp + lane);
          buckets.coefficient[local * pairs.vocabulary + place] = pair.coefficient;
        }
      }
      __syncwarp();
    }
  }
}

// Turns counts into offsets by an exclusive sum over (token, slice), a block per sequence.
__global__ void __launch_bounds__(kThreads)
    scan_kernel(int32_t* offsets, int slices, Sequences sequences, int64_t first_sequence) {
  constexpr int kGroup = 8;  // slices, loaded together
  __shared__ int32_t totals[kWarps];
  const Span span = sequence_span(sequences, first_sequence + blockIdx.x);
  int32_t carried = 0;
  for (int64_t first = span.start; first < span.stop; first += kThreads) {
    const int64_t token = first + threadIdx.x;
    const bool inside = token < span.stop;
    int32_t total = 0;
#pragma unroll 8
    for (int s = 0; s < slices; ++s) total += inside ? offsets[s * sequences.rows + token] : 0;
    const Sums<int32_t> sums = block_sums(total, totals);
    int32_t offset = carried + sums.before;
    carried += sums.total;
    for (int group = 0; inside && group < slices; group += kGroup) {
      int32_t count[kGroup];
#pragma unroll
      for (int s = 0; s < kGroup; ++s) {
        count[s] = group + s < slices ? offsets[(group + s) * sequences.rows + token] : 0;
      }
#pragma unroll
      for (int s = 0; s < kGroup; ++s) {
        if (group + s < slices) offsets[(group + s) * sequences.rows + token] = offset;
        offset += count[s];
      }
    }
  }
}

// Adds c * weight[v] for the pairs [begin, end) of one sequence, in order.
template <typename T, int kVec>
__device__ void add_pairs(RowSum<T, kVec>& sum, const int32_t* entries, const Accumulator<T>* coefficients, int begin,
                          int end, const T* weight, int64_t dim, int64_t vocabulary, int lane) {
  using Acc = Accumulator<T>;
  for (int first = begin; first < end; first += kWarp) {
    const int count = min(kWarp, end - first);
    int64_t entry = lane < count ? entries[first + lane] : 0;
    // A place is unwritten only where cu_seqlens does not rise.
    entry = min(max(entry, int64_t{0}), vocabulary - 1);
    const Acc coefficient = lane < count ? coefficients[first + lane] : Acc(0);
#pragma unroll(RowSum<T, kVec>::kLoads < 8 ? 2 : 1)
    for (int i = 0; i < count; ++i) {
      const Acc factor = __shfl_sync(kAllLanes, coefficient, i);
      const int64_t row = __shfl_sync(kAllLanes, entry, i);
      sum.add(factor, weight + row * dim);
    }
  }
}

// A block owns a few neighbouring tokens of a sequence at a time; blockIdx.y is a tile of dimensions. One warp
// adds the pairs of a token with few pairs; the whole block adds those of a token with many, such as the first token.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    grad_hidden_kernel(const Buckets<Accumulator<T>> buckets, Sequences sequences, const T* weight, T* grad_hidden,
                       int64_t dim, int64_t vocabulary, int64_t blocks_per_sequence, int tokens_per_block) {
  using Acc = Accumulator<T>;
  constexpr int kAlone = 32;  // pairs
  __shared__ Acc saved[(kWarps - 1) * RowSum<T, kVec>::kDims];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t local = blockIdx.x / blocks_per_sequence;
  const Span span = sequence_span(sequences, buckets.first_sequence + local);
  const int64_t first_dim = static_cast<int64_t>(blockIdx.y) * RowSum<T, kVec>::kDims;
  const T* weight_tile = weight + first_dim;
  T* target = grad_hidden + first_dim;
  const int32_t* ends = buckets.offsets + (buckets.slices - 1) * sequences.rows;
  const int32_t* entries = buckets.entry + local * vocabulary;
  const Acc* coefficients = buckets.coefficient + local * vocabulary;
  const auto bucket_begin = [&](int64_t token) { return token == span.start ? 0 : max(ends[token - 1], 0); };
  const auto bucket_end = [&](int64_t token) {
    return static_cast<int>(min(static_cast<int64_t>(ends[token]), vocabulary));
  };
  RowSum<T, kVec> sum(lane, dim - first_dim);
  for (int64_t first = span.start + blockIdx.x % blocks_per_sequence * tokens_per_block; first < span.stop;
       first += blocks_per_sequence * tokens_per_block) {
    const int64_t own = first + warp;
    if (warp < tokens_per_block && own < span.stop) {
      const int begin = bucket_begin(own), end = bucket_end(own);
      if (end - begin <= kAlone) {
        sum.clear();
        add_pairs(sum, entries, coefficients, begin, end, weight_tile, dim, vocabulary, lane);
        sum.store(target + own * dim);
      }
    }
    for (int64_t token = first; token < min(first + tokens_per_block, span.stop); ++token) {
      const int begin = bucket_begin(token), end = bucket_end(token);
      if (end - begin <= kAlone) continue;  // the same for the whole block
      const int per_warp = (end - begin + kWarps - 1) / kWarps;
      sum.clear();
      add_pairs(sum, entries, coefficients, begin + warp * per_warp, min(begin + (warp + 1) * per_warp, end),
                weight_tile, dim, vocabulary, lane);
      if (warp > 0) sum.save(saved + (warp - 1) * RowSum<T, kVec>::kDims);
      __syncthreads();
      if (warp == 0) {
        for (int w = 1; w < kWarps; ++w) sum.add_saved(saved + (w - 1) * RowSum<T, kVec>::kDims);
        sum.store(target + token * dim);
      }
      __syncthreads();
    }
  }
}

template <typename T>
void launch_grad_hidden(const Pairs<T>& pairs, const HeadInput& input, const Tensor& grad_hidden,
                        const OnDevice& device, const char* op) {
  using Acc = Accumulator<T>;
  constexpr int64_t kPairBytes = int64_t{64} << 20, kMaxOffsets = int64_t{8} << 20;
  constexpr int64_t kMaxSlices = 64, kMinSliceEntries = 256, kWarpsPerMultiprocessor = 32;
  const int64_t rows = input.rows(), dim = input.dim(), vocabulary = pairs.vocabulary, batch = pairs.batch;
  if (grad_hidden.numel() == 0) return;
  const bool no_pairs = batch == 0 || vocabulary == 0;
  // A packed token may belong to no sequence, which only the device knows: the kernels skip such tokens.
  if (no_pairs || input.cu_seqlens) {
    Tensor target = grad_hidden;
    torch::stable::zero_(target);
  }
  if (no_pairs) return;
  const int64_t pair_bytes = static_cast<int64_t>(sizeof(int32_t) + sizeof(Acc));
  const int64_t sequences = std::max<int64_t>(std::min(kPairBytes / (vocabulary * pair_bytes), batch), 1);
  const int64_t wanted = std::min({ceil_div(device.multiprocessors() * kWarpsPerMultiprocessor, sequences),
                                   ceil_div(vocabulary, kMinSliceEntries), kMaxOffsets / rows, kMaxSlices});
  const int64_t slice_entries = ceil_div(ceil_div(vocabulary, std::max<int64_t>(wanted, 1)), kWarp) * kWarp;
  const int64_t slices = ceil_div(vocabulary, slice_entries);
  const std::vector<int64_t> offset_shape{slices, rows}, pair_shape{sequences, vocabulary};
  const Tensor offsets = new_tensor(input.weight, offset_shape, ScalarType::Int);
  const Tensor entry = new_tensor(input.weight, pair_shape, ScalarType::Int);
  const Tensor coefficient = new_tensor(input.weight, pair_shape, accumulation_type(input.weight.scalar_type()));

  // Several tokens per block only where there are plenty. A packed sequence may exceed the mean length: blocks loop.
  const int64_t plenty = ceil_div(rows, device.multiprocessors()) / 16;
  const int tokens_per_block = static_cast<int>(std::max<int64_t>(std::min<int64_t>(plenty, kWarps), 1));
  const int64_t tokens = input.cu_seqlens ? std::min(2 * ceil_div(rows, batch), rows) : input.length;
  const int64_t blocks_per_sequence = ceil_div(tokens, tokens_per_block);
  for (int64_t first = 0; first < batch; first += sequences) {
    const int64_t count = std::min(sequences, batch - first);
    const Buckets<Acc> buckets{first,
                               count,
                               static_cast<int>(slices),
                               slice_entries,
                               mutable_data<int32_t>(offsets),
                               mutable_data<int32_t>(entry),
                               mutable_data<Acc>(coefficient)};
    const unsigned blocks = grid_size(ceil_div(count * slices, kWarps));
    bucket_kernel<T, false><<<blocks, kThreads, 0, device.stream()>>>(pairs, buckets);
    check_launch(op);
    scan_kernel<<<grid_size(count), kThreads, 0, device.stream()>>>(buckets.offsets, buckets.slices, pairs.sequences,
                                                                    first);
    check_launch(op);
    bucket_kernel<T, true><<<blocks, kThreads, 0, device.stream()>>>(pairs, buckets);
    check_launch(op);
    const int64_t all = dim | address<T>(input.weight) | address<T>(grad_hidden);
    dispatch_rows<T>(all, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      const dim3 grid = grid_size(count * blocks_per_sequence, ceil_div(dim, RowSum<T, kVec>::kDims));
      grad_hidden_kernel<T, kVec><<<grid, kThreads, 0, device.stream()>>>(
          buckets, pairs.sequences, const_data<T>(input.weight), mutable_data<T>(grad_hidden), dim, vocabulary,
          blocks_per_sequence, tokens_per_block);
    });
    check_launch(op);
  }
}

// Sum pooling ----------------------------------------------------------------------------------------------------

// Hidden states for the products: masked tokens are 0, so that a NaN there does not spread as 0 * NaN.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    masked_rows_kernel(const T* hidden, const bool* mask, T* masked, int64_t dim) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * dim;
  const bool is_real = mask[blockIdx.x];
  for (int64_t i = threadIdx.x; i < dim; i += kThreads) {
    masked[first + i] = is_real ? hidden[first + i] : from_acc<T>(0);
  }
}

// Returns the sequence of a packed row: the last sequence that starts at or before it.
__device__ int64_t find_sequence(const int32_t* starts, int64_t batch, int64_t row) {
  int64_t low = 0, high = batch;  // starts[low] <= row < starts[high], if cu_seqlens is valid
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

constexpr int64_t kColumnsPerBlock = 8 * kThreads;

// product = grad * activation'(product + bias), for the blockIdx.x-th row and a tile of columns; bias and grad are at
// the first column.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    to_gradient_kernel(T* product, int64_t columns, const T* bias, const void* grad, bool grad_in_acc,
                       int64_t vocabulary, const bool* mask, Sequences sequences, int64_t batch, int64_t first_row,
                       Activation activation) {
  using Acc = Accumulator<T>;
  const int64_t row = first_row + blockIdx.x;
  const int64_t b = sequences.starts != nullptr ? find_sequence(sequences.starts, batch, row) : row / sequences.length;
  const Span span = sequence_span(sequences, b);
  const bool is_real = row >= span.start && row < span.stop && (mask == nullptr || mask[row]);
  T* target = product + blockIdx.x * columns;
  const int64_t begin = blockIdx.y * kColumnsPerBlock, end = min(begin + kColumnsPerBlock, columns);
#pragma unroll 4
  for (int64_t column = begin + threadIdx.x; column < end; column += kThreads) {
    Acc gradient = Acc(0);
    if (is_real) {
      const Acc logit = to_acc(target[column]) + (bias != nullptr ? to_acc(bias[column]) : Acc(0));
      gradient = coefficient(load_either<T>(grad, grad_in_acc, b * vocabulary + column), logit, activation);
    }
    target[column] = from_acc<T>(gradient);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(void* sum, bool sum_in_acc, const void* part, bool part_in_acc, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    store_either<T>(sum, sum_in_acc, i, load_either<T>(sum, sum_in_acc, i) + load_either<T>(part, part_in_acc, i));
  }
}

// The device functions that head_sum_backward calls.
template <typename T>
struct SumDevice {
  const Tensor& grad;  // (B, V), contiguous
  const HeadInput& input;
  Activation activation;
  const OnDevice& device;
  const char* op;

  void to_gradient(const Tensor& product, int64_t first_token, int64_t first_column) const {
    const int64_t rows = product.size(0), columns = product.size(1);
    if (rows == 0 || columns == 0) return;
    check_product(product, input.weight.scalar_type());
    if (input.batch == 0) {
      Tensor target = product;
      torch::stable::zero_(target);
      return;
    }
    const int64_t grad_offset = first_column * static_cast<int64_t>(grad.element_size());
    const dim3 grid = grid_size(rows, ceil_div(columns, kColumnsPerBlock));
    to_gradient_kernel<T><<<grid, kThreads, 0, device.stream()>>>(
        mutable_data<T>(product), columns, input.bias ? const_data<T>(*input.bias) + first_column : nullptr,
        static_cast<const char*>(grad.const_data_ptr()) + grad_offset, grad.scalar_type() != input.weight.scalar_type(),
        input.vocabulary(), input.mask ? const_data<bool>(*input.mask) : nullptr, input.sequences(), input.batch,
        first_token, activation);
    check_launch(op);
  }

  void accumulate(const Tensor& sum, const Tensor& part) const {
    const int64_t count = sum.numel();
    if (count == 0) return;
    const ScalarType dtype = input.weight.scalar_type();
    check_product(part, accumulation_type(dtype));  // under autocast torch's sum is in float32
    const int64_t blocks = std::min(ceil_div(count, kThreads), device.multiprocessors() * 32);
    accumulate_kernel<T><<<grid_size(blocks), kThreads, 0, device.stream()>>>(
        sum.mutable_data_ptr(), sum.scalar_type() != dtype, part.const_data_ptr(), part.scalar_type() != dtype, count);
    check_launch(op);
  }

  void check_product(const Tensor& product, ScalarType other) const {
    const ScalarType dtype = product.scalar_type();
    STD_TORCH_CHECK(dtype == input.weight.scalar_type() || dtype == other, "a product of torch came as ",
                    torch::headeronly::toString(dtype), ": leave autocast before the backward");
  }
};

template <typename T>
Tensor masked_tokens(const HeadInput& input, const OnDevice& device, const char* op) {
  if (!input.mask || input.tokens.numel() == 0) return input.tokens;
  const Tensor masked = new_tensor(input.tokens, input.tokens.sizes());
  masked_rows_kernel<T><<<grid_size(input.rows()), kThreads, 0, device.stream()>>>(
      const_data<T>(input.tokens), const_data<bool>(*input.mask), mutable_data<T>(masked), input.dim());
  check_launch(op);
  return masked;
}

// Host functions -------------------------------------------------------------------------------------------------

// Gradients of the shapes of their tensors, or without elements where not needed.
struct Gradients {
  Tensor hidden, weight, bias;
};

Gradients new_gradients(const Tensor& hidden, const Tensor& weight, bool needs_hidden, bool needs_weight,
                        bool needs_bias) {
  const std::vector<int64_t> none{0}, entries{weight.size(0)};
  return {needs_hidden ? new_tensor(hidden, hidden.sizes()) : new_tensor(hidden, none),
          needs_weight ? new_tensor(weight, weight.sizes()) : new_tensor(weight, none),
          new_tensor(weight, needs_bias ? entries : none)};
}

std::tuple<Tensor, Tensor, Tensor> backward_max(const Tensor& grad, const Tensor& max_logits, const Tensor& argmax,
                                                const Tensor& hidden, const Tensor& weight,
                                                const std::optional<Tensor>& cu_seqlens, int64_t activation_code,
                                                bool needs_hidden, bool needs_weight, bool needs_bias) {
  const char* op = "head_backward_max";
  const Activation activation = check_activation(activation_code);
  const HeadInput input = check_input(hidden, weight, std::nullopt, std::nullopt, cu_seqlens);
  check_head_grad(grad, hidden, input.batch, input.vocabulary());
  check_saved(grad, max_logits, argmax, input.batch, input.vocabulary(), head_position_type(hidden, cu_seqlens));
  const OnDevice device(hidden, op);
  const Gradients gradients = new_gradients(hidden, weight, needs_hidden, needs_weight, needs_bias);
  const Tensor dense_grad = as_contiguous(grad);
  dispatch_floating(hidden.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Pairs<T> pairs{dense_grad.const_data_ptr(),
                         grad.scalar_type() != hidden.scalar_type(),
                         const_data<Accumulator<T>>(max_logits),
                         argmax.const_data_ptr(),
                         static_cast<int>(argmax.element_size()),
                         activation,
                         input.batch,
                         input.vocabulary(),
                         input.sequences()};
    const auto if_any = [](bool needed, const Tensor& gradient) {
      return needed && gradient.numel() > 0 ? std::optional(gradient) : std::nullopt;
    };
    const std::optional<Tensor> grad_weight = if_any(needs_weight, gradients.weight);
    const std::optional<Tensor> grad_bias = if_any(needs_bias, gradients.bias);
    if (grad_weight || grad_bias) launch_grad_weight(pairs, input, grad_weight, grad_bias, device, op);
    if (needs_hidden) launch_grad_hidden(pairs, input, gradients.hidden, device, op);
  });
  return {gradients.hidden, gradients.weight, gradients.bias};
}

std::tuple<Tensor, Tensor, Tensor> backward_sum(const Tensor& grad, const Tensor& hidden, const Tensor& weight,
                                                const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
                                                const std::optional<Tensor>& cu_seqlens, int64_t activation_code,
                                                bool needs_hidden, bool needs_weight, bool needs_bias) {
  const char* op = "head_backward_sum";
  constexpr int64_t kChunkBytes = int64_t{32} << 20;
  const Activation activation = check_activation(activation_code);
  const HeadInput input = check_input(hidden, weight, bias, mask, cu_seqlens);
  check_head_grad(grad, hidden, input.batch, input.vocabulary());
  const OnDevice device(hidden, op);
  const Gradients gradients = new_gradients(hidden, weight, needs_hidden, needs_weight, needs_bias);
  const Tensor dense_grad = as_contiguous(grad);
  // Sums over blocks of tokens use the accumulation type and are rounded once.
  const auto wide = [](const Tensor& gradient) {
    const ScalarType acc = accumulation_type(gradient.scalar_type());
    return gradient.scalar_type() == acc ? gradient : new_tensor(gradient, gradient.sizes(), acc);
  };
  const auto round_to = [](Tensor target, const Tensor& sum) {
    if (target.scalar_type() != sum.scalar_type()) torch::stable::copy_(target, sum);
  };
  SumGradients sums;
  if (needs_hidden) {
    sums.hidden = torch::stable::view(gradients.hidden, std::vector<int64_t>{input.rows(), input.dim()});
  }
  if (needs_weight) sums.weight = wide(gradients.weight);
  if (needs_bias) sums.bias = wide(gradients.bias);
  dispatch_floating(hidden.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const SumDevice<T> sum_device{dense_grad, input, activation, device, op};
    head_sum_backward(masked_tokens<T>(input, device, op), input.weight, kChunkBytes, sum_device, sums);
  });
  if (needs_weight) round_to(gradients.weight, *sums.weight);
  if (needs_bias) round_to(gradients.bias, *sums.bias);
  return {gradients.hidden, gradients.weight, gradients.bias};
}

}  // namespace
}  // namespace splade_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CUDA, m) {
  m.impl("head_backward_max", TORCH_BOX(&splade_fast::cuda::backward_max));
  m.impl("head_backward_sum", TORCH_BOX(&splade_fast::cuda::backward_sum));
}
