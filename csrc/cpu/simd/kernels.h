// Tables of the CPU kernels, one for each instruction set and element type. kernels_impl.h implements the kernels,
// CMake compiles it once for each instruction set (see table.cpp.in), and instruction_set.cpp chooses a table at run
// time.
#pragma once

#include <cstdint>

#include "common/options.h"
#include "common/philox.h"
#include "cpu/simd/dtypes.h"

namespace splade_fast::cpu {

// Product of packed tokens and a panel of vocabulary entries, pooled into the state of each sequence: value
// (sequences, state_stride), with argmax for max pooling or lost for sum pooling. The caller initialises the state.
template <typename Acc>
struct Panel {
  const void* tokens;  // packed by pack() in tiles of tile_tokens
  const void* weight;  // panel_columns entries, packed by pack()
  int64_t dim;
  int64_t num_tokens;
  const int32_t* sequence;  // (num_tokens,) row of the state
  const int32_t* position;  // (num_tokens,) position in the sequence
  Acc* value;
  Position<Acc>* argmax;  // nullptr if it is not needed
  Acc* lost;              // rounding error of value, see compensated.h; sum pooling only
  int64_t state_stride;
  const Acc* bias;  // (panel_columns,), added before the activation; sum pooling only
  Activation activation;
  const void* next_weight;  // memory to prefetch, because it is packed next
  int64_t next_bytes;
};

// Entries collected from a row, in ascending columns. The buffers have room for kSlack entries beyond the capacity.
template <typename Acc>
struct RowEntries {
  static constexpr int64_t kSlack = 64;
  Acc* value;
  int32_t* column;
  SortKey<Acc>* key;  // scratch of keep_largest
  int64_t capacity;
  int64_t count;
};

// Product of sparse documents (N, width) and the table of a block of queries.
template <typename T>
struct ScoreTask {
  using Acc = Accumulator<T>;

  const int32_t* rows;  // (num_cols + 1,) row of each column in the table, 0 if no query of the block uses the column
  const Acc* table;     // (rows, lanes), a lane for each query; row 0 is zero, and lanes fill whole vectors
  int64_t num_cols;
  int64_t lanes;
  const int32_t* indices;
  const T* values;
  const int32_t* lengths;
  int64_t width;
  int32_t* hit_rows;  // scratch of width + kMaxLanes
  Acc* hit_values;
  Acc* scores;  // (documents, lanes)
};

constexpr int64_t kMaxLanes = 16;  // largest number of lanes of a vector, of all instruction sets

// Product scores (count, lanes) = scale * slots x queries.
template <typename Acc>
struct ProductTask {
  const void* slots;    // packed by pack() in tiles of tile_tokens
  const void* queries;  // packed by pack() in neighbouring panels of panel_columns
  int64_t dim;
  int64_t count;
  int64_t lanes;  // a multiple of panel_columns
  Acc scale;
  Acc* scores;
  const void* next;  // memory to prefetch, because it is packed next
  int64_t next_bytes;
};

// Scores (count, lanes) of neighbouring slots, with a lane for each query. lanes is a multiple of kMaxLanes.
template <typename Acc>
struct SampleTile {
  const Acc* scores;
  int64_t count, lanes;
  philox::State state;
  uint64_t first_slot, first_query;  // their numbers in the counter of philox.h
  Acc inv_temp;
  const Acc* bounds;  // (lanes,) perturbed scores below the bound of their query are not drawn
  // (lanes,) logsumexp so far: the sum of exp(score - maximum), or of exp(score) if maximum is not finite
  Acc *maximum, *sum;
  int32_t* places;  // (count * lanes,) places of the scores that may be drawn
  uint32_t* words;  // their words of noise
};

template <typename T>
struct Kernels {
  using Acc = Accumulator<T>;

  int64_t tile_tokens;
  int64_t panel_columns;
  int64_t step_dims;  // dimensions that one instruction multiplies
  int64_t (*packed_bytes)(int64_t lanes, int64_t dim);

  // Pack `count` rows of base for the product kernels: dimension by dimension, with `lanes` rows side by side. Missing
  // rows are zero. rows are their numbers, or nullptr for neighbouring rows.
  void (*pack)(void* packed, int64_t lanes, const T* base, int64_t stride, const int64_t* rows, int64_t count,
               int64_t dim);
  void (*head_max)(const Panel<Acc>& panel);
  void (*head_sum)(const Panel<Acc>& panel);
  // products[i] = tokens[i] · entries[i], with the bits that head_max and head_sum compute.
  void (*multiply_pairs)(const T* const* tokens, const T* const* entries, int64_t count, int64_t dim, Acc* products);

  // Pool `count` rows of `columns` logits into value and, unless it is nullptr, argmax.
  void (*pool_max)(const T* const* rows, const int32_t* position, int64_t count, int64_t columns, Acc* value,
                   Position<Acc>* argmax);
  void (*pool_sum)(const T* const* rows, int64_t count, int64_t columns, Activation activation, Acc* value);

  // logit[i] += bias[i] unless bias is nullptr, and pooled[i] = activation(logit[i]).
  void (*activate_logits)(Acc* logit, const Acc* bias, int64_t columns, Activation activation, T* pooled);

  // coefficient[i] = grad[i] * activation'(logit[i]), and 0 where logit[i] <= 0.
  void (*coefficients)(const T* grad, const Acc* logit, int64_t columns, Activation activation, Acc* coefficient);
  // The same with all in T: the gradient of sum pooling.
  void (*sum_gradient)(const T* grad, const T* logit, int64_t columns, Activation activation, T* grad_logit);

  void (*axpy)(Acc* y, Acc a, const T* x, int64_t n);  // y += a x
  // target = sum of factors[i] * rows[i] over i in ascending order
  void (*combine)(T* target, const Acc* factors, const T* const* rows, int64_t count, int64_t n);
  void (*store)(T* target, const Acc* source, int64_t n);
  void (*load)(Acc* target, const T* source, int64_t n);

  // Append the entries from column `first` on that are not <= threshold, and return the column after the last one read.
  // Reading stops at the end of the row, or when fewer than kSlack places are free.
  int64_t (*collect)(const T* row, int64_t first, int64_t columns, Acc threshold, RowEntries<Acc>& found);
  // Keep the k largest entries, 1 <= k <= count, and return the smallest of them. Of equal entries the first are kept,
  // and NaN is the largest.
  Acc (*keep_largest)(RowEntries<Acc>& found, int64_t k);

  // Score documents [begin, end). Return end, or the first document whose length or column is out of range.
  int64_t (*score_rows)(const ScoreTask<T>& task, int64_t begin, int64_t end);
  // target[q * stride + n] = scores[n * lanes + q]
  void (*store_scores)(T* target, int64_t stride, const Acc* scores, int64_t lanes, int64_t queries, int64_t count);
  // Find the scores (count, lanes) whose key is above the bound of their query. Store their keys and places, in
  // ascending order of places, and return their number.
  int64_t (*find_above_bounds)(const Acc* scores, int64_t count, int64_t lanes, const SortKey<Acc>* bounds,
                               SortKey<Acc>* keys, int32_t* places);

  void (*multiply_slots)(const ProductTask<Acc>& task);
  // Add a tile to the logsumexp, and find the scores that may reach their bounds. Return their number.
  int64_t (*sample_tile)(const SampleTile<Acc>& tile);
  // Update the maxima (lanes,) and their positions by scores (count, lanes), whose positions start at `first`.
  void (*group_maximum)(const Acc* scores, int64_t first, int64_t count, int64_t lanes, Acc* value,
                        Position<Acc>* position);
};

struct AllKernels {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<bfloat16> bf16;
  Kernels<float16> f16;
  // Add one to every age. Return the largest former age, or INT32_MIN if there is none.
  int32_t (*grow_older)(int32_t* age, int64_t count);
};

// Tables of all instruction sets of the build. This machine may not support all of them.
const AllKernels& kernels_portable();
#if defined(__x86_64__)
const AllKernels& kernels_avx2();
const AllKernels& kernels_avx512();
const AllKernels& kernels_avx512bf16();
#endif

// Table of the instruction set that instruction_set.cpp has chosen.
const AllKernels& all_kernels();

template <typename T>
const Kernels<T>& kernels() {
  const AllKernels& all = all_kernels();
  if constexpr (std::is_same_v<T, float>) return all.f32;
  if constexpr (std::is_same_v<T, double>) return all.f64;
  if constexpr (std::is_same_v<T, bfloat16>) return all.bf16;
  if constexpr (std::is_same_v<T, float16>) return all.f16;
}

}  // namespace splade_fast::cpu
