// The CPU kernels as tables of functions: one table per instruction set and element type, chosen once at run time.
// kernels_impl.h implements them, kernels_<isa>.cpp compile it, instruction_set.cpp chooses.
#pragma once

#include <cstdint>

#include "common/options.h"
#include "common/philox.h"
#include "cpu/dtypes.h"

namespace splade_fast::cpu {

// One panel of vocabulary entries against packed tokens. A token's product lands in the state row of its
// sequence: value (sequences, state_stride), for max also argmax and for sum lost, all initialised by the caller.
template <typename Acc>
struct Panel {
  const void* tokens;  // packed by pack(): tiles of tile_tokens
  const void* weight;  // packed by pack(): panel_columns entries
  int64_t depth;       // D
  int64_t num_tokens;
  const int32_t* sequence;  // (num_tokens,) state row of each token
  const int32_t* position;  // (num_tokens,) what the argmax records
  Acc* value;
  Position<Acc>* argmax;  // nullptr: not wanted
  Acc* lost;              // sum only: what value has lost to rounding, see compensated.h
  int64_t state_stride;
  const Acc* bias;  // (panel_columns,), sum only: there it goes in before the activation
  Activation activation;
  const void* next_weight;  // what will be packed next, asked for from memory meanwhile
  int64_t next_bytes;
};

// Entries of a row that may be kept, in ascending columns. The buffers hold kSlack more than the capacity.
template <typename Acc>
struct Candidates {
  static constexpr int64_t kSlack = 64;
  Acc* value;
  int32_t* column;
  Position<Acc>* key;  // scratch of keep_largest
  int64_t capacity;
  int64_t count;
};

// Sparse documents (N, width) against the table of a block of queries.
template <typename T>
struct ScoreTask {
  using Acc = Accumulator<T>;

  const int32_t* rows;  // (num_cols + 1,) a column's row in the table, 0 where no query of the block has it
  const Acc* table;     // (rows, lanes): a lane per query, whole vectors; row 0 is zero
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

constexpr int64_t kMaxLanes = 16;  // of a vector, in any instruction set

// scores (count, lanes) = scale * slots x queries.
template <typename Acc>
struct ProductTask {
  const void* slots;    // packed by pack(): tiles of tile_tokens
  const void* queries;  // packed by pack(): panels of panel_columns, one after the other
  int64_t depth;
  int64_t count;
  int64_t lanes;  // whole panels
  Acc scale;
  Acc* scores;
  const void* next;  // what will be packed next, asked for from memory meanwhile
  int64_t next_bytes;
};

// Scores (count, lanes) of neighbouring slots, a lane per query; lanes are a multiple of kMaxLanes.
template <typename Acc>
struct SampleTile {
  const Acc* scores;
  int64_t count, lanes;
  philox::State state;
  uint64_t first_slot, first_query;  // their numbers in the noise
  Acc inv_temp;
  const Acc* bounds;   // (lanes,) what a perturbed score has to exceed
  Acc *maximum, *sum;  // (lanes,) of the logsumexp so far: sum of exp(score - maximum), or of exp(score) where that
                       // is not finite
  int32_t* places;     // (count * lanes,) the scores that may be drawn
  uint32_t* words;     // their noise's words
};

template <typename T>
struct Kernels {
  using Acc = Accumulator<T>;

  int64_t tile_tokens;
  int64_t panel_columns;
  int64_t step_depth;  // products of a lane in one instruction
  int64_t (*packed_bytes)(int64_t lanes, int64_t depth);

  // Interleave up to `lanes` rows (depth-major, missing rows zero) for the product kernels. rows == nullptr: the
  // rows follow each other.
  void (*pack)(void* packed, int64_t lanes, const T* base, int64_t stride, const int64_t* rows, int64_t count,
               int64_t depth);
  void (*head_max)(const Panel<Acc>& panel);
  void (*head_sum)(const Panel<Acc>& panel);
  // products[i] of tokens[i] and entries[i], rows of `depth`: to the bit what the two above compute.
  void (*multiply_pairs)(const T* const* tokens, const T* const* entries, int64_t count, int64_t depth, Acc* products);

  // Reduce `count` rows of `columns` logits into value (and argmax, unless nullptr).
  void (*pool_max)(const T* const* rows, const int32_t* position, int64_t count, int64_t columns, Acc* value,
                   Position<Acc>* argmax);
  void (*pool_sum)(const T* const* rows, int64_t count, int64_t columns, Activation activation, Acc* value);

  // logit[i] = value[i] + bias[i] (in place; bias may be nullptr), pooled[i] = activation(logit[i]).
  void (*finish_max)(Acc* value, const Acc* bias, int64_t columns, Activation activation, T* pooled);

  // coefficient[i] = grad[i] * activation'(logit[i]), 0 where logit[i] <= 0.
  void (*coefficients)(const T* grad, const Acc* logit, int64_t columns, Activation activation, Acc* coefficient);
  // The same for one row of logits in their own type: the gradient of sum pooling.
  void (*sum_gradient)(const T* grad, const T* logit, int64_t columns, Activation activation, T* grad_logit);

  void (*axpy)(Acc* y, Acc a, const T* x, int64_t n);      // y += a x
  void (*store)(T* target, const Acc* source, int64_t n);  // convert
  void (*load)(Acc* target, const T* source, int64_t n);

  // Append the entries from column `first` on that are not <= threshold, until the row ends or the candidates are
  // (nearly) full: returns the column where it stopped. Fewer than kSlack free places may stop it.
  int64_t (*collect)(const T* row, int64_t first, int64_t columns, Acc threshold, Candidates<Acc>& found);
  // Keep the k largest, 1 <= k <= count, of equal ones the first; returns the smallest kept. NaN is the largest.
  Acc (*keep_largest)(Candidates<Acc>& found, int64_t k);

  // Scores of documents [begin, end). Returns end, or the first document whose length or column is out of range.
  int64_t (*score_rows)(const ScoreTask<T>& task, int64_t begin, int64_t end);
  // target[q * stride + n] = scores[n * lanes + q]
  void (*store_scores)(T* target, int64_t stride, const Acc* scores, int64_t lanes, int64_t queries, int64_t count);
  // Scores whose key is above the bound of their query: their keys and places in (count, lanes), ascending. Keys are
  // integers in the order of the scores. Returns how many.
  int64_t (*find_candidates)(const Acc* scores, int64_t count, int64_t lanes, const Position<Acc>* bounds,
                             Position<Acc>* keys, int32_t* places);

  void (*multiply_slots)(const ProductTask<Acc>& task);
  // Adds a tile to the logsumexp and finds the scores that might exceed their bounds. Returns how many.
  int64_t (*sample_tile)(const SampleTile<Acc>& tile);
  // Running maxima (lanes,) of scores (count, lanes) and their positions, which start at `first`.
  void (*group_maximum)(const Acc* scores, int64_t first, int64_t count, int64_t lanes, Acc* value,
                        Position<Acc>* position);
};

struct AllKernels {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<bfloat16> bf16;
  Kernels<float16> f16;
  // Every age grows by one; returns the largest before, INT32_MIN of none.
  int32_t (*grow_older)(int32_t* age, int64_t count);
};

// Each instruction set of the build; this machine may not run all of them.
const AllKernels& kernels_portable();
#if defined(__x86_64__)
const AllKernels& kernels_avx2();
const AllKernels& kernels_avx512();
const AllKernels& kernels_avx512bf16();
#endif

// The best set that this machine runs; SPLADE_FAST_ISA lowers it to one of those in instruction_set.cpp.
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
