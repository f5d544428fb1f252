// sample on CUDA: Gumbel-Max draws and the logsumexp of scores that exist a tile at a time.
//
// A tile (queries, slots) is sized to stay in the second-level cache. torch's GEMM, or the kernel of score, writes it;
// then a block takes a part of the slots of a query, sums its part of the logsumexp, makes the noise (one Philox block
// for four slots) and picks the first draws of the part. One block per query merges the parts with the result of
// earlier tiles. Nothing depends on the order in which blocks run. Tiles follow each other on the stream, so the draws
// of earlier tiles are a bound that spares most slots of later tiles the logarithms of their noise.
//
// Grouped top_k keeps the maxima of the groups (queries, top_k) tile by tile; exact top_k keeps the highest scores, by
// the selection of prune over those kept so far and the tile. Both draw from the kept scores at the end.
#include <torch/csrc/stable/library.h>

#include <array>
#include <limits>
#include <tuple>

#include "common/sample.h"
#include "common/torch_ops.h"
#include "cuda/score/score.h"
#include "cuda/selection.cuh"

namespace splade_fast::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kQuads = 4;  // Philox blocks per thread, four slots each
constexpr int kPerThread = kQuads * static_cast<int>(philox::kSlotsPerBlock);
constexpr int64_t kPartSlots = kThreads * kPerThread;  // slots of a block
constexpr int64_t kMaxParts = kThreads - 1;            // in a tile: a thread of the merge takes one
constexpr int64_t kTileBytes = int64_t{16} << 20;
constexpr int64_t kSmallGroup = 1024;  // slots of a group that a single warp reduces

// Device functions -----------------------------------------------------------------------------------------------

template <typename Acc>
__device__ inline Acc negative_infinity() {
  return -static_cast<Acc>(INFINITY);
}

template <typename Acc>
struct Draw {
  Acc perturbed, score;
  int64_t slot;
};

template <typename Acc>
__device__ inline Draw<Acc> no_draw() {
  return {negative_infinity<Acc>(), negative_infinity<Acc>(), INT64_MAX};
}

template <typename Acc>
__device__ inline bool before(const Draw<Acc>& a, const Draw<Acc>& b) {
  return philox::is_drawn_before(a.perturbed, a.slot, b.perturbed, b.slot);
}

template <typename Acc>
__device__ inline Draw<Acc> shuffle_xor(const Draw<Acc>& draw, int lanes) {
  return {__shfl_xor_sync(kAllLanes, draw.perturbed, lanes), __shfl_xor_sync(kAllLanes, draw.score, lanes),
          __shfl_xor_sync(kAllLanes, draw.slot, lanes)};
}

// Returns the first of the draws of all threads to all threads of the block.
template <typename Acc>
__device__ Draw<Acc> first_of_block(const Draw<Acc>& mine, Draw<Acc> (&of_warps)[kWarps], int warps = kWarps) {
  const auto first = [](const Draw<Acc>& a, const Draw<Acc>& b) { return before(b, a) ? b : a; };
  return block_reduce(mine, of_warps, first, warps);
}

template <typename Acc>
__device__ inline Acc finite_or_zero(Acc x) {
  return isfinite(x) ? x : Acc(0);
}

__device__ inline float exp_of(float x) { return ::expf(x); }
__device__ inline double exp_of(double x) { return ::exp(x); }

// Whether the noise of a word might raise a score by -gap: see may_be_drawn() in cpu/simd/sample_impl.h. NaN passes.
__device__ inline bool may_be_drawn(float gap, uint32_t word) {
  constexpr float kLog2E = 0x1.715476p0f, kWordBits = 24, kSlack = 0x1p-10f, kLimit = 100;
  const float exponent = fmaxf(fminf(gap * kLog2E + (kWordBits + kSlack), kLimit), -kLimit);
  const float bound = __int_as_float(static_cast<int>((exponent + 127) * 0x1p23f));
  return static_cast<float>(word >> 8) <= bound;
}

// The scores of a tile with their scale and masks.
template <typename T>
struct Tile {
  const T* scores;  // (queries, columns)
  int64_t columns;
  int64_t first;         // slot of the first column
  const int64_t* slots;  // (queries, columns), where slots are not consecutive; else null
  Accumulator<T> scale;
  const bool *valid, *exclude;  // rows of all slots, a stride apart; null: none
  int64_t valid_stride, exclude_stride;

  bool has_quads;  // whether four neighbouring columns of scores and masks can be read at once

  // Whether a column is masked. The loads do not wait for each other.
  __device__ bool is_out(int64_t query, int64_t column) const {
    const int64_t slot = first + column;
    const bool is_invalid = valid != nullptr && !valid[query * valid_stride + slot];
    const bool is_excluded = exclude != nullptr && exclude[query * exclude_stride + slot];
    return is_invalid || is_excluded;
  }

  __device__ Accumulator<T> score(int64_t query, int64_t column) const {
    const Accumulator<T> score = philox::multiply(to_acc(scores[query * columns + column]), scale);
    return is_out(query, column) ? negative_infinity<Accumulator<T>>() : score;
  }

  __device__ int64_t slot(int64_t query, int64_t column) const {
    return slots != nullptr ? slots[query * columns + column] : first + column;
  }
};

// The columns of a thread: kQuads times four, which lie 4 * kThreads apart.
struct Columns {
  int64_t first, count;  // count: of the tile

  __device__ int64_t quad(int q) const { return first + q * (4 * kThreads); }
  __device__ int64_t at(int i) const { return quad(i / 4) + i % 4; }
  __device__ bool is_inside(int i) const { return at(i) >= 0 && at(i) < count; }
  // The nearest column of the tile, so that loads are unconditional and in flight together.
  __device__ int64_t clamped(int i) const { return min(max(at(i), int64_t{0}), count - 1); }
  __device__ int64_t clamped_quad(int q) const { return min(quad(q), count - 4); }
};

template <typename T>
__device__ void load_columns(const T* row, const Columns& columns, bool has_quads, T (&values)[kPerThread]) {
  constexpr int kVec = kMaxVector<T> < 4 ? kMaxVector<T> : 4;
  if (has_quads) {
#pragma unroll
    for (int i = 0; i < kPerThread; i += kVec) {
      const Vector<T, kVec> vector = load_vector<kVec>(row + columns.clamped_quad(i / 4) + i % 4);
#pragma unroll
      for (int j = 0; j < kVec; ++j) values[i + j] = vector.element[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) values[i] = row[columns.clamped(i)];
  }
}

// The scores of a thread; -inf outside of the tile.
template <typename T>
__device__ void load_scores(const Tile<T>& tile, int64_t query, const Columns& columns,
                            Accumulator<T> (&score)[kPerThread]) {
  T values[kPerThread];
  uint8_t flags[kPerThread];
  unsigned is_out = 0;  // a bit for each column
  load_columns(tile.scores + query * tile.columns, columns, tile.has_quads, values);
  if (tile.valid != nullptr) {
    const bool* row = tile.valid + query * tile.valid_stride + tile.first;
    load_columns(reinterpret_cast<const uint8_t*>(row), columns, tile.has_quads, flags);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) is_out |= static_cast<unsigned>(flags[i] == 0) << i;
  }
  if (tile.exclude != nullptr) {
    const bool* row = tile.exclude + query * tile.exclude_stride + tile.first;
    load_columns(reinterpret_cast<const uint8_t*>(row), columns, tile.has_quads, flags);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) is_out |= static_cast<unsigned>(flags[i] != 0) << i;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const bool counts = columns.is_inside(i) && (is_out >> i & 1) == 0;
    score[i] = counts ? philox::multiply(to_acc(values[i]), tile.scale) : negative_infinity<Accumulator<T>>();
  }
}

template <typename Acc>
struct Drawing {
  const int64_t* state;  // seed, step
  int64_t slot_offset, query_offset;
  Acc inv_temp;
  int64_t num_samples;
};

// The draws of every query so far, in order.
template <typename Acc>
struct Draws {
  Acc *scores, *perturbed;  // (queries, num_samples)
  int64_t* indices;         // -1: none
};

// The results of the parts of a tile.
template <typename Acc>
struct TileDraws {
  int64_t count, room;  // room: number of draws of a part
  Acc *scores, *perturbed;
  int64_t* slots;      // (queries, count, room)
  int32_t* found;      // (queries, count)
  Acc *maximum, *sum;  // (queries, count)
};

// Writes the maximum and the sum of a part of the logsumexp.
template <typename Acc>
__device__ void write_logsumexp(const Acc (&score)[kPerThread], const TileDraws<Acc>& parts, int64_t place,
                                Acc (&of_warps)[kWarps]) {
  Acc maximum = negative_infinity<Acc>();
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) maximum = score[i] > maximum ? score[i] : maximum;
  maximum = block_reduce(maximum, of_warps, [](Acc a, Acc b) { return b > a ? b : a; });
  const Acc reference = finite_or_zero(maximum);
  Acc sum = Acc(0);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) sum += exp_of(score[i] - reference);
  sum = block_reduce(sum, of_warps, [](Acc a, Acc b) { return a + b; });
  if (threadIdx.x == 0) {
    parts.maximum[place] = maximum;
    parts.sum[place] = sum;
  }
}

// Writes the first draws of a part, one after the other: each is the first after the one before.
template <typename T>
__device__ void write_draws(const Accumulator<T> (&perturbed)[kPerThread], const Accumulator<T> (&score)[kPerThread],
                            const Tile<T>& tile, int64_t query, int64_t first_column,
                            const TileDraws<Accumulator<T>>& parts, int64_t place,
                            Draw<Accumulator<T>> (&of_warps)[kWarps]) {
  using Acc = Accumulator<T>;
  Draw<Acc> last = no_draw<Acc>();
  int found = 0;
  for (; found < parts.room; ++found) {
    Draw<Acc> mine = no_draw<Acc>();
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (perturbed[i] == negative_infinity<Acc>()) continue;
      const int64_t column = first_column + (i / 4) * (4 * kThreads) + i % 4;
      const Draw<Acc> candidate{perturbed[i], score[i], tile.slot(query, column)};
      if ((found == 0 || before(last, candidate)) && before(candidate, mine)) mine = candidate;
    }
    last = first_of_block(mine, of_warps);
    if (last.slot == INT64_MAX) break;
    if (threadIdx.x == 0) {
      const int64_t target = place * parts.room + found;
      parts.perturbed[target] = last.perturbed;
      parts.scores[target] = last.score;
      parts.slots[target] = last.slot;
    }
  }
  if (threadIdx.x == 0) parts.found[place] = found;
}

// The source of the noise of a score.
enum class Noise {
  kOfColumns,    // consecutive slots: a Philox block serves four
  kOfGivenSlots  // each slot has a number of its own
};

// Kernels --------------------------------------------------------------------------------------------------------

// A block per query and part. A thread takes the columns of whole Philox blocks; `phase` is the place of the first
// column in its Philox block.
template <typename T, Noise kNoise>
__global__ void __launch_bounds__(kThreads)
    draw_kernel(const Tile<T> tile, const Drawing<Accumulator<T>> drawing, const Accumulator<T>* perturbed_so_far,
                const TileDraws<Accumulator<T>> parts) {
  using Acc = Accumulator<T>;
  __shared__ Acc sums[kWarps];
  __shared__ Draw<Acc> draws_of_warps[kWarps];
  const int64_t query = blockIdx.x / parts.count, part = blockIdx.x % parts.count;
  const philox::State state = philox::unpack_state(drawing.state[0], drawing.state[1]);
  const uint32_t query_number = static_cast<uint32_t>(drawing.query_offset + query);
  const int64_t first_number = drawing.slot_offset + tile.first;  // of the first column
  const int phase = kNoise == Noise::kOfColumns ? static_cast<int>(first_number % philox::kSlotsPerBlock) : 0;
  const int64_t first_column = part * kPartSlots + 4 * static_cast<int64_t>(threadIdx.x) - phase;

  Acc score[kPerThread], perturbed[kPerThread];
  load_scores(tile, query, Columns{first_column, tile.columns}, score);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) perturbed[i] = negative_infinity<Acc>();
  write_logsumexp(score, parts, blockIdx.x, sums);

  Acc bound = perturbed_so_far[(query + 1) * drawing.num_samples - 1];
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    const int64_t start = first_column + quad * (4 * kThreads);
    bool any = false;
#pragma unroll
    for (int j = 0; j < 4; ++j) any |= score[4 * quad + j] != negative_infinity<Acc>();
    if (!any) continue;
    philox::Words words{};
    if constexpr (kNoise == Noise::kOfColumns) {
      const uint32_t block = static_cast<uint32_t>((first_number + start) / philox::kSlotsPerBlock);
      words = philox::block_words(state, block, query_number, philox::Domain::kNoise);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Acc value = score[4 * quad + j];
      if (value == negative_infinity<Acc>()) continue;
      Acc sum;
      if constexpr (kNoise == Noise::kOfGivenSlots) {
        const uint64_t number = static_cast<uint64_t>(drawing.slot_offset + tile.slot(query, start + j));
        sum = philox::perturb(value, drawing.inv_temp, philox::gumbel_at_slot(state, query_number, number));
      } else {
        // Rounds the product as perturb() does. Contracted with the difference it could be less.
        const Acc tempered = philox::multiply(value, drawing.inv_temp);
        if (!may_be_drawn(static_cast<float>(tempered - bound), words.word[j])) continue;
        const uint64_t number = static_cast<uint64_t>(first_number + start + j);
        sum = philox::perturb(value, drawing.inv_temp,
                              philox::gumbel_from_word(state, words.word[j], query_number, number));
      }
      perturbed[4 * quad + j] = sum;
      // With one draw, the slots of this thread are a bound as well.
      if (drawing.num_samples == 1 && sum > bound) bound = sum;
    }
  }
  write_draws(perturbed, score, tile, query, first_column, parts, blockIdx.x, draws_of_warps);
}

// Merges what was found in a tile with the result of earlier tiles, a block per query.
//
// The draws of a part are a list in order, and so are the draws of earlier tiles: one list more than there are parts,
// and at most as many as the block has threads. Thread t stands for list t and holds the number (`next`) of the first
// draw in it that has not been taken. In every turn each thread offers this draw, the block finds the first of them
// all, which is the next draw of the query, and the thread that offered it moves on in its list. A list that has ended
// offers no_draw(). Where all have ended, the places that remain get -1.
//
// The logsumexp comes in the same shape: thread t has the maximum and the sum of part t, or of earlier tiles. The sums
// are scaled to the largest maximum and added in a fixed order, so the result does not depend on which block of the
// tile ran first.
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const TileDraws<Acc> parts, int64_t num_samples, const Draws<Acc> before_tile,
                 const Draws<Acc> after_tile, Acc* maximum, double* sum, Acc* logsumexp) {
  __shared__ Draw<Acc> draws_of_warps[kWarps];
  __shared__ double sums_of_warps[kWarps];
  const int64_t query = blockIdx.x, row = query * num_samples;
  const int64_t list = threadIdx.x;
  const bool is_part = list < parts.count, is_so_far = list == parts.count;
  const int64_t place = query * parts.count + list;
  const int64_t length = is_part ? parts.found[place] : (is_so_far ? num_samples : 0);
  int64_t next = 0;
  for (int64_t i = 0; i < num_samples; ++i) {
    Draw<Acc> mine = no_draw<Acc>();
    if (next < length) {
      if (is_part) {
        const int64_t source = place * parts.room + next;
        mine = {parts.perturbed[source], parts.scores[source], parts.slots[source]};
      } else if (before_tile.indices[row + next] >= 0) {
        mine = {before_tile.perturbed[row + next], before_tile.scores[row + next], before_tile.indices[row + next]};
      }
    }
    const Draw<Acc> first = first_of_block(mine, draws_of_warps);
    const bool none = first.slot == INT64_MAX;
    if (!none && mine.slot == first.slot) ++next;
    if (threadIdx.x == 0) {
      after_tile.perturbed[row + i] = first.perturbed;
      after_tile.scores[row + i] = first.score;
      after_tile.indices[row + i] = none ? -1 : first.slot;
    }
  }
  // A part with a sum of 0 has no scores, hence no maximum.
  const double own_sum = is_part ? parts.sum[place] : is_so_far ? sum[query] : 0.0;
  const double own_maximum = is_part ? finite_or_zero(parts.maximum[place]) : finite_or_zero(maximum[query]);
  const double reference = block_reduce(own_sum != 0 ? own_maximum : negative_infinity<double>(), sums_of_warps,
                                        [](double a, double b) { return ::fmax(a, b); });
  const double total = block_reduce(own_sum != 0 ? scaled_sum(own_sum, own_maximum - reference) : 0.0, sums_of_warps,
                                    [](double a, double b) { return a + b; });
  if (threadIdx.x != 0) return;
  maximum[query] = total != 0 ? static_cast<Acc>(reference) : Acc(0);
  sum[query] = total;
  logsumexp[query] = total != 0 ? static_cast<Acc>(reference + ::log(total)) : negative_infinity<Acc>();
}

// Maxima of the groups that a tile touches, a block per query and group. Earlier tiles have the lower slots.
template <typename Acc>
__global__ void group_kernel(const Tile<Acc> tile, int64_t first_group, int64_t groups_of_tile, int64_t groups,
                             int64_t slots, Acc* kept_scores, int64_t* kept_slots) {
  __shared__ Draw<Acc> draws_of_warps[kWarps];
  const int64_t query = blockIdx.x / groups_of_tile, group = first_group + blockIdx.x % groups_of_tile;
  const int64_t start = group_start(group, groups, slots), stop = group_start(group + 1, groups, slots);
  const int64_t begin = max(start, tile.first), end = min(stop, tile.first + tile.columns);
  Draw<Acc> mine = no_draw<Acc>();
  for (int64_t slot = begin + threadIdx.x; slot < end; slot += blockDim.x) {
    const Acc score = tile.score(query, slot - tile.first);
    const Draw<Acc> candidate{score, score, slot};
    if (before(candidate, mine)) mine = candidate;
  }
  const Draw<Acc> first = first_of_block(mine, draws_of_warps, static_cast<int>(blockDim.x) / kWarp);
  if (threadIdx.x != 0) return;
  const int64_t place = query * groups + group;
  if (begin != start && !before(first, {kept_scores[place], kept_scores[place], kept_slots[place]})) return;
  kept_scores[place] = first.score;
  kept_slots[place] = first.slot;
}

// The highest scores of every query so far, in the order of their slots. -inf: none.
template <typename Acc>
struct Kept {
  Acc* scores;     // (queries, count)
  int64_t* slots;  // (queries, count)
};

// A block per query selects among the scores kept of earlier tiles, which have the lower slots, and those of the tile.
template <typename Acc>
__global__ void __launch_bounds__(selection::kThreads, 1)
    keep_kernel(const Tile<Acc> tile, int count, const Kept<Acc> before_tile, const Kept<Acc> after_tile) {
  using Key = OrderedKey<Acc>;
  __shared__ selection::Shared<Key> shared;
  const int64_t query = blockIdx.x, row = query * count;
  // Both kinds of score by the same instructions, so that the loads of several are in flight together.
  const auto score = [&](int i) {
    const bool is_kept = i < count;
    const int64_t column = max(i - count, 0);
    const Acc value = is_kept ? before_tile.scores[row + i] : tile.scores[query * tile.columns + column];
    const Acc scaled = philox::multiply(value, is_kept ? Acc(1) : tile.scale);
    return !is_kept && tile.is_out(query, column) ? negative_infinity<Acc>() : scaled;
  };
  const auto keep = [&](int i, Key, int place) {
    after_tile.scores[row + place] = score(i);
    after_tile.slots[row + place] = i < count ? before_tile.slots[row + i] : tile.first + (i - count);
  };
  const int found = selection::select_largest(
                        shared, count + static_cast<int>(tile.columns), count, to_key(negative_infinity<Acc>()),
                        [&](int i) { return to_key(score(i)); }, [](Key) { return Key(0); }, keep)
                        .count;
  for (int place = found + static_cast<int>(threadIdx.x); place < count; place += selection::kThreads) {
    after_tile.scores[row + place] = negative_infinity<Acc>();
    after_tile.slots[row + place] = -1;
  }
}

template <typename Acc>
__global__ void scale_kernel(Acc* scores, int64_t count, Acc scale) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) scores[i] = philox::multiply(scores[i], scale);
}

// exclude (queries, width) slots: a thread each.
template <typename Acc>
__global__ void exclude_kernel(Acc* scores, int64_t columns, int64_t first, const int64_t* exclude, int64_t queries,
                               int64_t width) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= queries * width) return;
  const int64_t column = exclude[i] - first;
  if (exclude[i] >= 0 && column >= 0 && column < columns) {
    scores[i / width * columns + column] = negative_infinity<Acc>();
  }
}

// Launchers ------------------------------------------------------------------------------------------------------

template <typename Acc>
constexpr ScalarType kScalarType = std::is_same_v<Acc, double> ? ScalarType::Double : ScalarType::Float;

Tensor matrix(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  return new_tensor(like, std::vector<int64_t>{rows, columns}, dtype);
}

// Slots of a tile, in whole parts.
int64_t tile_slots(int64_t queries, int64_t element_bytes) {
  const int64_t fit = kTileBytes / (std::max<int64_t>(queries, 1) * element_bytes);
  return std::min(std::max(fit / kPartSlots, int64_t{1}), kMaxParts - 1) * kPartSlots;
}

// Whether every fourth column of scores and masks, in every row, begins at an address of four columns.
template <typename T>
bool has_quads(const Tile<T>& tile) {
  const auto address = [](const void* data) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)); };
  int64_t all = tile.columns;
  if (tile.valid != nullptr) all |= (address(tile.valid) + tile.first) | tile.valid_stride;
  if (tile.exclude != nullptr) all |= (address(tile.exclude) + tile.first) | tile.exclude_stride;
  return all % 4 == 0 && address(tile.scores) % std::min<int64_t>(4 * sizeof(T), kVectorBytes) == 0;
}

// Collects the draws of all queries, tile by tile. Two sets of outputs take turns: a merge reads one, writes the other.
template <typename Acc>
class Sampler {
 public:
  Sampler(const SampleOptions& options, int64_t num_samples, Noise noise, const Tensor& state, const Tensor& like,
          int64_t queries, const OnDevice& device)
      : noise_(noise),
        state_(as_contiguous(state)),
        drawing_{const_data<int64_t>(state_), options.slot_offset, options.query_offset,
                 static_cast<Acc>(options.inv_temp), num_samples},
        like_(like),
        queries_(queries),
        device_(device),
        current_(like, kScalarType<Acc>, queries, num_samples),
        next_(like, kScalarType<Acc>, queries, num_samples),
        maximum_(new_zeros_tensor(like, std::vector<int64_t>{queries}, kScalarType<Acc>)),
        sum_(new_zeros_tensor(like, std::vector<int64_t>{queries}, ScalarType::Double)) {
    const double nothing = -std::numeric_limits<double>::infinity();
    torch::stable::fill_(current_.scores, nothing);
    torch::stable::fill_(current_.perturbed, nothing);
    torch::stable::fill_(current_.logsumexp, nothing);
    torch::stable::fill_(current_.indices, -1.0);
  }

  template <typename T>
  void add(Tile<T> tile) {
    if (queries_ == 0 || tile.columns == 0) return;
    const bool of_columns = noise_ == Noise::kOfColumns;
    const int64_t phase = of_columns ? (drawing_.slot_offset + tile.first) % philox::kSlotsPerBlock : 0;
    tile.has_quads = phase == 0 && has_quads(tile);
    const int64_t count = ceil_div(tile.columns + phase, kPartSlots), room = std::min(drawing_.num_samples, kPartSlots);
    const Tensor scores = matrix(like_, queries_ * count, room, kScalarType<Acc>);
    const Tensor perturbed = matrix(like_, queries_ * count, room, kScalarType<Acc>);
    const Tensor slots = matrix(like_, queries_ * count, room, ScalarType::Long);
    const Tensor found = matrix(like_, queries_, count, ScalarType::Int);
    const Tensor maximum = matrix(like_, queries_, count, kScalarType<Acc>);
    const Tensor sum = matrix(like_, queries_, count, kScalarType<Acc>);
    const TileDraws<Acc> parts{count,
                               room,
                               mutable_data<Acc>(scores),
                               mutable_data<Acc>(perturbed),
                               mutable_data<int64_t>(slots),
                               mutable_data<int32_t>(found),
                               mutable_data<Acc>(maximum),
                               mutable_data<Acc>(sum)};
    const Draws<Acc> current = draws_in(current_), next = draws_in(next_);
    const unsigned blocks = grid_size(queries_ * count);
    const auto draw = [&](auto noise) {
      draw_kernel<T, decltype(noise)::value>
          <<<blocks, kThreads, 0, device_.stream()>>>(tile, drawing_, current.perturbed, parts);
    };
    switch (noise_) {
      case Noise::kOfColumns:
        draw(std::integral_constant<Noise, Noise::kOfColumns>{});
        break;
      case Noise::kOfGivenSlots:
        draw(std::integral_constant<Noise, Noise::kOfGivenSlots>{});
        break;
    }
    merge_kernel<Acc><<<grid_size(queries_), kThreads, 0, device_.stream()>>>(
        parts, drawing_.num_samples, current, next, mutable_data<Acc>(maximum_), mutable_data<double>(sum_),
        mutable_data<Acc>(next_.logsumexp));
    std::swap(current_, next_);
  }

  const Samples& result() const { return current_; }

 private:
  static Draws<Acc> draws_in(const Samples& samples) {
    return {mutable_data<Acc>(samples.scores), mutable_data<Acc>(samples.perturbed),
            mutable_data<int64_t>(samples.indices)};
  }

  const Noise noise_;
  const Tensor state_;
  const Drawing<Acc> drawing_;
  const Tensor& like_;
  const int64_t queries_;
  const OnDevice& device_;
  Samples current_, next_;
  Tensor maximum_, sum_;
};

// Draws from scores (queries, kept) with given slots, at most kMaxParts parts at a time.
template <typename Acc>
Samples sample_kept(const SampleOptions& options, const Tensor& state, const Tensor& scores, const Tensor& slots,
                    const OnDevice& device) {
  Sampler<Acc> sampler(options, options.num_samples, Noise::kOfGivenSlots, state, scores, scores.size(0), device);
  const int64_t columns = scores.size(1);
  for (int64_t first = 0; first < columns; first += kMaxParts * kPartSlots) {
    const int64_t count = std::min(kMaxParts * kPartSlots, columns - first);
    const Tensor part = as_contiguous(narrowed(scores, 1, first, count));
    const Tensor numbers = as_contiguous(narrowed(slots, 1, first, count));
    sampler.add(Tile<Acc>{const_data<Acc>(part), count, 0, const_data<int64_t>(numbers), Acc(1), nullptr, nullptr, 0, 0,
                          false});
  }
  return sampler.result();
}

// Sets the boolean masks of a tile. Listed exclusions are written into the scores instead.
template <typename T>
void set_masks(Tile<T>& tile, const SampleMasks& masks) {
  if (masks.valid) {
    tile.valid = const_data<bool>(*masks.valid);
    tile.valid_stride = masks.valid->dim() == 2 ? masks.valid->size(1) : 0;
  }
  if (masks.exclude && masks.exclude->scalar_type() == ScalarType::Bool) {
    tile.exclude = const_data<bool>(*masks.exclude);
    tile.exclude_stride = masks.exclude->size(1);
  }
}

// Calls body(tile) for every tile. products(first, count) returns the unscaled scores (queries, count) of the slots
// from `first` on.
template <typename Acc, typename Products, typename Body>
void for_each_tile(const SampleOptions& options, const SampleMasks& masks, int64_t queries, int64_t slots,
                   const OnDevice& device, const Products& products, const Body& body) {
  if (queries == 0) return;
  const int64_t most = tile_slots(queries, sizeof(Acc));
  for (int64_t first = 0; first < slots; first += most) {
    const int64_t count = std::min(most, slots - first);
    const Tensor scores = products(first, count);
    Tile<Acc> tile{
        const_data<Acc>(scores), count, first, nullptr, static_cast<Acc>(options.scale), nullptr, nullptr, 0, 0, false};
    set_masks(tile, masks);
    if (masks.exclude && masks.exclude->scalar_type() == ScalarType::Long && masks.exclude->size(1) > 0) {
      const int64_t width = masks.exclude->size(1);
      scale_kernel<Acc><<<grid_size(ceil_div(queries * count, kThreads)), kThreads, 0, device.stream()>>>(
          mutable_data<Acc>(scores), queries * count, tile.scale);
      exclude_kernel<Acc><<<grid_size(ceil_div(queries * width, kThreads)), kThreads, 0, device.stream()>>>(
          mutable_data<Acc>(scores), count, first, const_data<int64_t>(*masks.exclude), queries, width);
      tile.scale = Acc(1);
    }
    body(tile);
  }
}

template <typename Acc, typename ForEachTile>
Samples sample_groups(const SampleOptions& options, const Tensor& state, const Tensor& like, int64_t queries,
                      int64_t slots, const OnDevice& device, const ForEachTile& for_each) {
  const int64_t groups = *options.top_k;
  const Tensor scores = matrix(like, queries, groups, kScalarType<Acc>);
  const Tensor kept = matrix(like, queries, groups, ScalarType::Long);
  for_each([&](const Tile<Acc>& tile) {
    const int64_t first = find_group(tile.first, groups, slots);
    const int64_t of_tile = find_group(tile.first + tile.columns - 1, groups, slots) - first + 1;
    const int threads = ceil_div(slots, groups) > kSmallGroup ? kThreads : kWarp;
    group_kernel<Acc><<<grid_size(queries * of_tile), threads, 0, device.stream()>>>(
        tile, first, of_tile, groups, slots, mutable_data<Acc>(scores), mutable_data<int64_t>(kept));
  });
  return sample_kept<Acc>(options, state, scores, kept, device);
}

template <typename Acc, typename ForEachTile>
Samples sample_highest(const SampleOptions& options, const Tensor& state, const Tensor& like, int64_t queries,
                       const OnDevice& device, const ForEachTile& for_each) {
  const int64_t count = *options.top_k;
  STD_TORCH_CHECK(count <= INT32_MAX / 2, "top_k must be at most 2^30 on a GPU, got ", count);
  std::array<Tensor, 2> scores{matrix(like, queries, count, kScalarType<Acc>),
                               matrix(like, queries, count, kScalarType<Acc>)};
  std::array<Tensor, 2> slots{matrix(like, queries, count, ScalarType::Long),
                              matrix(like, queries, count, ScalarType::Long)};
  torch::stable::fill_(scores[0], -std::numeric_limits<double>::infinity());
  torch::stable::fill_(slots[0], -1.0);
  const auto kept = [&](int i) { return Kept<Acc>{mutable_data<Acc>(scores[i]), mutable_data<int64_t>(slots[i])}; };
  for_each([&](const Tile<Acc>& tile) {
    keep_kernel<Acc><<<grid_size(queries), selection::kThreads, 0, device.stream()>>>(tile, static_cast<int>(count),
                                                                                      kept(0), kept(1));
    std::swap(scores[0], scores[1]);
    std::swap(slots[0], slots[1]);
  });
  return sample_kept<Acc>(options, state, scores[0], slots[0], device);
}

using SampleResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename Acc, typename Products>
SampleResult sample_by_tiles(const SampleOptions& options, const SampleMasks& masks, const Tensor& state,
                             const Tensor& like, int64_t queries, int64_t slots, const OnDevice& device,
                             const Products& products) {
  const auto for_each = [&](const auto& body) {
    for_each_tile<Acc>(options, masks, queries, slots, device, products, body);
  };
  if (options.top_k && *options.top_k < slots) {
    return (options.exact ? sample_highest<Acc>(options, state, like, queries, device, for_each)
                          : sample_groups<Acc>(options, state, like, queries, slots, device, for_each))
        .tuple();
  }
  Sampler<Acc> sampler(options, options.num_samples, Noise::kOfColumns, state, like, queries, device);
  for_each([&](const Tile<Acc>& tile) { sampler.add(tile); });
  return sampler.result().tuple();
}

// Host functions -------------------------------------------------------------------------------------------------

// Calls body(Type<Acc>{}) with float or double.
template <typename Body>
SampleResult dispatch_accumulation(ScalarType dtype, const Body& body) {
  return dtype == ScalarType::Double ? body(Type<double>{}) : body(Type<float>{});
}

SampleResult sample_dense(const Tensor& queries, const Tensor& cache, const Tensor& state, int64_t num_samples,
                          double scale, double inv_temp, std::optional<int64_t> top_k, bool exact,
                          const std::optional<Tensor>& valid, const std::optional<Tensor>& exclude, int64_t slot_offset,
                          int64_t query_offset) {
  const char* op = "sample_dense";
  const SampleOptions options{num_samples, scale, inv_temp, top_k, exact, slot_offset, query_offset};
  check_dense_cache(queries, cache);
  const int64_t batch = queries.size(0), slots = cache.size(0);
  check_sample(options, {valid, exclude}, state, cache, batch, slots);
  const OnDevice device(cache, op);
  const SampleMasks masks = contiguous_masks({valid, exclude});
  const ScalarType dtype = promote_types(queries.scalar_type(), cache.scalar_type()), acc = accumulation_type(dtype);
  const Tensor rows = contiguous_as(queries, dtype);
  const auto products = [&](int64_t first, int64_t count) {
    const Tensor tile = contiguous_as(narrowed(cache, 0, first, count), dtype);
    Tensor scores = matrix(cache, batch, count, acc);
    if (queries.size(1) == 0) {
      torch::stable::zero_(scores);
    } else if (dtype == acc) {
      aten::mm_out(scores, rows, torch::stable::transpose(tile, 0, 1));
    } else {
      aten::mm_out_dtype(scores, rows, torch::stable::transpose(tile, 0, 1));
    }
    return scores;
  };
  const SampleResult result = dispatch_accumulation(dtype, [&](auto type) {
    using Acc = typename decltype(type)::type;
    return sample_by_tiles<Acc>(options, masks, state, cache, batch, slots, device, products);
  });
  check_launch(op);
  return result;
}

SampleResult sample_sparse(const std::optional<Tensor>& query_indices, const Tensor& query_values,
                           const std::optional<Tensor>& query_lengths, const Tensor& doc_indices,
                           const Tensor& doc_values, const Tensor& doc_lengths, int64_t num_cols, const Tensor& state,
                           int64_t num_samples, double scale, double inv_temp, std::optional<int64_t> top_k, bool exact,
                           const std::optional<Tensor>& valid, const std::optional<Tensor>& exclude,
                           int64_t slot_offset, int64_t query_offset) {
  const char* op = "sample_sparse";
  const SampleOptions options{num_samples, scale, inv_temp, top_k, exact, slot_offset, query_offset};
  check_score_inputs(query_indices, query_values, query_lengths, doc_indices, doc_values, doc_lengths, num_cols);
  const int64_t batch = query_values.size(0), slots = doc_values.size(0);
  check_sample(options, {valid, exclude}, state, doc_values, batch, slots);
  const OnDevice device(doc_values, op);
  const SampleMasks masks = contiguous_masks({valid, exclude});
  const ScalarType acc = accumulation_type(promote_types(query_values.scalar_type(), doc_values.scalar_type()));
  const auto products = [&](int64_t first, int64_t count) {
    return sparse_products({query_indices, query_values, query_lengths, narrowed(doc_indices, 0, first, count),
                            narrowed(doc_values, 0, first, count), narrowed(doc_lengths, 0, first, count), num_cols},
                           acc, device);
  };
  const SampleResult result = dispatch_accumulation(acc, [&](auto type) {
    using Acc = typename decltype(type)::type;
    return sample_by_tiles<Acc>(options, masks, state, doc_values, batch, slots, device, products);
  });
  check_launch(op);
  return result;
}

SampleResult sample_scores(const Tensor& scores, const Tensor& state, int64_t num_samples, double inv_temp,
                           const std::optional<Tensor>& valid, int64_t slot_offset, int64_t query_offset) {
  const char* op = "sample_scores";
  const SampleOptions options{num_samples, 1.0, inv_temp, std::nullopt, false, slot_offset, query_offset};
  check_floating("scores", scores, 2);
  const int64_t batch = scores.size(0), columns = scores.size(1);
  check_sample(options, {valid, std::nullopt}, state, scores, batch, columns);
  const OnDevice device(scores, op);
  const SampleMasks masks = contiguous_masks({valid, std::nullopt});
  std::optional<SampleResult> result;
  dispatch_floating(scores.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = Accumulator<T>;
    Sampler<Acc> sampler(options, num_samples, Noise::kOfColumns, state, scores, batch, device);
    // The rows of a tile are contiguous, so a tile of whole rows is read in place.
    const int64_t most = (kMaxParts - 1) * kPartSlots;
    for (int64_t first = 0; first < columns; first += most) {
      const int64_t count = std::min(most, columns - first);
      const Tensor part = as_contiguous(narrowed(scores, 1, first, count));
      Tile<T> tile{const_data<T>(part), count, first, nullptr, Acc(1), nullptr, nullptr, 0, 0, false};
      set_masks(tile, masks);
      sampler.add(tile);
    }
    result = sampler.result().tuple();
  });
  check_launch(op);
  return *result;
}

}  // namespace
}  // namespace splade_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CUDA, m) {
  m.impl("sample_dense", TORCH_BOX(&splade_fast::cuda::sample_dense));
  m.impl("sample_sparse", TORCH_BOX(&splade_fast::cuda::sample_sparse));
  m.impl("sample_scores", TORCH_BOX(&splade_fast::cuda::sample_scores));
}
