// Tiles of the head on sm_90a: their order, the columns of each sequence in a tile, and the maximum over the columns.
// Plain functions for host and device: tests/cpp/test_head_sm90.cpp runs them.
//
// A tile is kTileEntries vocabulary entries x kTileTokens packed tokens. A thread has 64 columns of two entries, four
// neighbouring threads have all columns. Tiles cross sequence boundaries, so the maximum is taken segment by segment;
// a sequence that lies in one tile is finished there, and keys in memory merge the others.
#pragma once

#include <cmath>
#include <initializer_list>

#include "cuda/head/sm90/layout.h"

namespace splade_fast::cuda::sm90 {

constexpr int kConsumers = 2;  // warpgroups that multiply; one more copies
constexpr int kThreads = (kConsumers + 1) * hopper::kWarpgroupThreads;
constexpr int kTileEntries = kConsumers * hopper::kInstructionEntries;
constexpr int kTileTokens = 256;
constexpr int kAccumulators = kTileTokens / 2;  // per thread
constexpr int kColumnGroups = kTileTokens / 8;

constexpr int kStages = 4;
constexpr int kEntryBytes = kTileEntries * hopper::kRowBytes;
constexpr int kTokenBytes = kTileTokens * hopper::kRowBytes;
constexpr int kStageBytes = kEntryBytes + kTokenBytes;
constexpr int kBarrierBytes = 2 * kStages * 8;
// The start of dynamic shared memory is only aligned to 16 bytes.
constexpr int kSharedBytes = kStages * kStageBytes + kBarrierBytes + hopper::kSwizzledBytes;
constexpr int kMaxSharedBytes = 227 << 10;  // per block on sm_90
static_assert(kSharedBytes <= kMaxSharedBytes);
static_assert(kEntryBytes % hopper::kSwizzledBytes == 0 && kTokenBytes % (2 * hopper::kSwizzledBytes) == 0);

// Registers per thread after the warpgroups have redistributed them; the sum fits the register file.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * hopper::kWarpgroupThreads <= 65536);

// Number of arrivals that free a stage: the warps that read it, in every block that receives its copies.
constexpr int empty_arrivals(int cluster) { return cluster * kConsumers * hopper::kWarpgroupThreads / 32; }

// Supported shapes -------------------------------------------------------------------------------------------------

// The kernel counts rows and entries in int32, and a tile may extend past the end. The copy engine needs rows and
// addresses that are multiples of 16 bytes.
constexpr int64_t kMaxSize = INT32_MAX - (1 << 20);

struct Shape {
  int64_t rows, batch, vocabulary, dim;
};

// Returns the number of blocks in a cluster. They share a token tile, and each multiplies other entries.
SPLADE_FAST_INLINE constexpr int choose_cluster(int64_t vocabulary) { return vocabulary > kTileEntries ? 2 : 1; }

SPLADE_FAST_INLINE int64_t token_tiles(const Shape& shape) { return (shape.rows + kTileTokens - 1) / kTileTokens; }

// Order of the tiles ---------------------------------------------------------------------------------------------

struct Tile {
  int entry, token;  // indices of the tile along both sides; entry counts clusters of tiles
};

// Order of the tiles. A group of token tiles sweeps over the whole vocabulary, so its tokens stay in the second-level
// cache, and blocks that run together share few tiles of either side.
struct TileOrder {
  static constexpr int kGroup = 8;
  int entry_tiles, token_tiles;

  SPLADE_FAST_INLINE static TileOrder of(int vocabulary, int rows, int cluster) {
    const int entries = cluster * kTileEntries;
    return {vocabulary / entries + (vocabulary % entries != 0), rows / kTileTokens + (rows % kTileTokens != 0)};
  }

  // fits() keeps the count within an int, since every tile divides by it.
  SPLADE_FAST_INLINE int64_t count() const { return static_cast<int64_t>(entry_tiles) * token_tiles; }

  SPLADE_FAST_INLINE Tile at(int index) const {
    const int per_group = kGroup * entry_tiles;
    const int first_token = index / per_group * kGroup;
    const int in_group = token_tiles - first_token < kGroup ? token_tiles - first_token : kGroup;
    const int rest = index % per_group;
    return {rest / in_group, first_token + rest % in_group};
  }
};

// Whether the kernel supports the shape, given the or-ed addresses of tokens and weight.
inline bool fits(const Shape& shape, hopper::Operand operand, uintptr_t addresses) {
  for (const int64_t size : {shape.rows, shape.batch, shape.vocabulary, shape.dim}) {
    if (size <= 0 || size > kMaxSize) return false;
  }
  const TileOrder order = TileOrder::of(static_cast<int>(shape.vocabulary), static_cast<int>(shape.rows), 1);
  return order.count() <= kMaxSize && shape.dim * hopper::element_bytes(operand) % hopper::kChunkBytes == 0 &&
         addresses % hopper::kChunkBytes == 0;
}

// Segments -------------------------------------------------------------------------------------------------------

// The columns [first, last) of a tile that belong to one sequence of the rows [start, stop).
struct Segment {
  int sequence, start, stop, first, last;

  SPLADE_FAST_INLINE bool is_whole_tile() const { return first == 0 && last == kTileTokens; }
};

// Whether all rows of a sequence are in one tile.
SPLADE_FAST_INLINE bool lies_in_one_tile(int start, int stop) {
  return start < stop && start / kTileTokens == (stop - 1) / kTileTokens;
}

// Returns the first sequence that ends after this row; starts must rise.
SPLADE_FAST_INLINE int first_sequence_after(const int32_t* starts, int batch, int row) {
  int low = 0, high = batch;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (starts[middle + 1] > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Calls body(segment) for each sequence with rows in the tile that begins at this row, from the given sequence on.
template <typename Body>
SPLADE_FAST_INLINE void for_each_segment(const int32_t* starts, int batch, int sequence, int row, Body body) {
  if (sequence >= batch) return;
  int start = starts[sequence];
  for (; sequence < batch; ++sequence) {
    const int stop = starts[sequence + 1], first = start - row, last = stop - row;
    if (first >= kTileTokens) break;
    const Segment segment{sequence, start, stop, first < 0 ? 0 : first, last < kTileTokens ? last : kTileTokens};
    if (segment.first < segment.last) body(segment);
    start = stop;
  }
}

// Keys -----------------------------------------------------------------------------------------------------------

// A key is a value and, where positions are kept, its position in one integer:
//
//   bits 63-32  to_key(value), an integer that sorts as the value does (common/float_bits.h)
//   bits 31-0   ~position
//
// So the largest key has the largest value, then the lowest position, and a maximum of keys needs no order: atomicMax
// merges those of threads and tiles. Without positions a key is the upper half alone. 0 is less than every key and
// stands for no row; memory for keys begins as 0. On the way a key changes its meaning of "position" once:
//
//   max_of_columns  the thread's columns of a segment       column of the tile
//   (shuffles)      four threads have all columns           column of the tile
//   emit            the sequence lies in the tile: store()  position in the sequence
//                   or it does not: merge(), by atomicMax   position in the sequence
//   store_remaining a launch later: merged() and store()    position in the sequence
//
// The rows of a sequence are packed in their order, so the lowest column has the lowest position.
template <bool kPositions>
using MaxKey = std::conditional_t<kPositions, uint64_t, uint32_t>;

template <bool kPositions>
SPLADE_FAST_INLINE MaxKey<kPositions> make_key(float value, uint32_t position) {
  if constexpr (kPositions) {
    return static_cast<uint64_t>(to_key(value)) << 32 | ~position;
  } else {
    return to_key(value);
  }
}

template <typename K>
SPLADE_FAST_INLINE float value_of(K key) {
  return from_key<float>(static_cast<uint32_t>(sizeof(K) == 8 ? key >> (8 * sizeof(K) - 32) : key));
}

template <typename K>
SPLADE_FAST_INLINE uint32_t position_of(K key) {
  return sizeof(K) == 8 ? ~static_cast<uint32_t>(key) : 0;
}

// Returns the key of the same value at another position.
template <typename K>
SPLADE_FAST_INLINE K moved_to(K key, uint32_t position) {
  if constexpr (sizeof(K) == 8) {
    return (key & ~static_cast<K>(0xffffffff)) | static_cast<uint32_t>(~position);
  } else {
    return key;
  }
}

// Maximum of a thread's columns ----------------------------------------------------------------------------------

SPLADE_FAST_INLINE float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b);
#endif
}

// Finds the key of each entry of a thread over its columns in [first, last), with the column as position; 0 without
// columns.
template <bool kPositions, bool kWholeTile>
SPLADE_FAST_INLINE void max_of_columns(const float (&accumulators)[kAccumulators], int thread, int first, int last,
                                       MaxKey<kPositions> (&key)[2]) {
  constexpr int kGroupsAtOnce = 4;
  const int own = thread % 4 * 2;
  // Whether column own + c is in the segment: one comparison for both ends.
  const uint32_t length = static_cast<uint32_t>(last - first);
  const auto inside = [&](int c) { return kWholeTile || static_cast<uint32_t>(own + c - first) < length; };
  float value[2] = {-INFINITY, -INFINITY};
  int best[2] = {-1, -1};
  SPLADE_FAST_UNROLL
  for (int block = 0; block < kColumnGroups; block += kGroupsAtOnce) {
    if (!kWholeTile && (first >= (block + kGroupsAtOnce) * 8 || last <= block * 8)) continue;
    SPLADE_FAST_UNROLL
    for (int i = 2 * block; i < 2 * (block + kGroupsAtOnce); ++i) {
      const int c = i / 2 * 8 + i % 2;
      if (!inside(c)) continue;
      SPLADE_FAST_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float candidate = accumulators[i / 2 * 4 + 2 * half + i % 2];
        if (kPositions) best[half] = candidate > value[half] ? c : best[half];
        value[half] = max_or_nan(value[half], candidate);
      }
    }
  }
  SPLADE_FAST_UNROLL
  for (int half = 0; half < 2; ++half) {
    // All values are -inf, or one is NaN: take the lowest column with the result.
    if (!(value[half] > -INFINITY)) {
      best[half] = -1;
      SPLADE_FAST_UNROLL
      for (int i = kTileTokens / 4 - 1; i >= 0; --i) {
        const float candidate = accumulators[i / 2 * 4 + 2 * half + i % 2];
        const int c = i / 2 * 8 + i % 2;
        if (inside(c) && (candidate == value[half] || candidate != candidate)) best[half] = c;
      }
    }
    const bool none = !(value[half] > -INFINITY) && best[half] < 0;
    key[half] = none ? 0 : make_key<kPositions>(value[half], static_cast<uint32_t>(own + best[half]));
  }
}

template <bool kPositions>
SPLADE_FAST_INLINE void max_of_segment(const float (&accumulators)[kAccumulators], int thread, const Segment& segment,
                                       MaxKey<kPositions> (&key)[2]) {
  if (segment.is_whole_tile()) {
    max_of_columns<kPositions, true>(accumulators, thread, 0, kTileTokens, key);
  } else {
    max_of_columns<kPositions, false>(accumulators, thread, segment.first, segment.last, key);
  }
}

// Sequences in one tile and in several ---------------------------------------------------------------------------

// At most one sequence that crosses the end of a tile begins in the tile, so the tile can stand for the sequence: the
// keys take as many rows as there are sequences or tiles, whichever is less.
SPLADE_FAST_INLINE int64_t key_slots(int64_t batch, int64_t tiles) { return batch < tiles ? batch : tiles; }

inline int64_t key_bytes(const Shape& shape, bool positions) {
  return key_slots(shape.batch, token_tiles(shape)) * shape.vocabulary * (positions ? 8 : 4);
}

// The packed rows, their sequences and their rows in the padded batch.
struct PackedRows {
  const int32_t* starts;       // (batch + 1,)
  const int32_t* source_rows;  // row of the padded batch; null: rows were not moved
  int64_t length;              // of a padded sequence; only with source_rows
  int batch, tiles;            // tiles: of the capacity of rows

  SPLADE_FAST_INLINE int position(int sequence, int row) const {
    if (source_rows == nullptr) return row - starts[sequence];
    return static_cast<int>(source_rows[row] - sequence * length);
  }

  SPLADE_FAST_INLINE int key_slot(int sequence) const {
    return batch < tiles ? sequence : starts[sequence] / kTileTokens;
  }
};

// Stores the maximum of one entry over a segment if the tile holds the whole sequence, else merges it with those of
// other tiles. first_row: of the tile.
template <typename K, typename Sink>
SPLADE_FAST_INLINE void emit(const PackedRows& rows, const Segment& segment, int first_row, int entry, K key,
                             Sink& sink) {
  const int position =
      sizeof(K) == 8 ? rows.position(segment.sequence, first_row + static_cast<int>(position_of(key))) : 0;
  if (lies_in_one_tile(segment.start, segment.stop)) {
    sink.store(segment.sequence, entry, value_of(key), position, true);
  } else {
    sink.merge(rows.key_slot(segment.sequence), entry, moved_to(key, static_cast<uint32_t>(position)));
  }
}

// Stores the results of sequences in several tiles and of sequences without rows.
template <typename Sink>
SPLADE_FAST_INLINE void store_remaining(const PackedRows& rows, int sequence, int entry, Sink& sink) {
  const int start = rows.starts[sequence], stop = rows.starts[sequence + 1];
  if (lies_in_one_tile(start, stop)) return;
  if (start >= stop) {
    sink.store(sequence, entry, -INFINITY, 0, false);
  } else {
    const auto key = sink.merged(rows.key_slot(sequence), entry);
    sink.store(sequence, entry, value_of(key), static_cast<int>(position_of(key)), true);
  }
}

}  // namespace splade_fast::cuda::sm90
