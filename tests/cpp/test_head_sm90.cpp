// The fused head of sm_90a without a GPU: the layout of elements, the order of tiles, the protocol of the stages, and
// the whole forward. Copies and wgmma are emulated as the PTX manual defines them.
#include <algorithm>
#include <random>
#include <vector>

#include "cuda/head/sm90/tiles.h"
#include "expect.h"

using namespace splade_fast;
using namespace splade_fast::cuda;
using namespace splade_fast::cuda::hopper;
using namespace splade_fast::cuda::sm90;

namespace {

// Layout ---------------------------------------------------------------------------------------------------------

constexpr int kSharedEnd = kMaxSharedBytes;

// A matrix (rows, dim) in global memory, of the bits of its elements.
template <typename T>
struct MatrixOf {
  int rows, dim;
  std::vector<T> element;

  MatrixOf(int rows, int dim) : rows(rows), dim(dim), element(static_cast<size_t>(rows) * dim) {}
  T& at(int row, int d) { return element[static_cast<size_t>(row) * dim + d]; }
  T at_or_zero(int row, int d) const {
    return row < rows && d < dim ? element[static_cast<size_t>(row) * dim + d] : T{0};
  }
};

using Matrix = MatrixOf<uint16_t>;  // of bfloat16
constexpr int kTileDims = row_elements(Operand::kBfloat16);

uint16_t to_bfloat16(float x) { return static_cast<uint16_t>(to_bits(x) >> 16); }  // exact where the test uses it
float from_bfloat16(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }

using SharedMemory = std::vector<uint8_t>;

// Copy as the copy engine does with a 128-byte swizzle: in every 8 rows of 128 bytes, the 16-byte chunk c of row r goes
// to chunk c ^ r. The box is 128 bytes wide, and elements outside of the matrix are 0.
template <typename T>
void copy_box(SharedMemory& shared, uint32_t target, const MatrixOf<T>& matrix, int first_dim, int first_row,
              int rows) {
  constexpr int kPerChunk = 16 / sizeof(T);
  EXPECT(target % 1024 == 0, "the swizzle's pattern begins at a multiple of 1024");
  for (int r = 0; r < rows; ++r) {
    for (int chunk = 0; chunk < 8; ++chunk) {
      for (int i = 0; i < kPerChunk; ++i) {
        const T value = matrix.at_or_zero(first_row + r, first_dim + chunk * kPerChunk + i);
        memcpy(&shared[target + r * 128 + (chunk ^ (r % 8)) * 16 + i * sizeof(T)], &value, sizeof(T));
      }
    }
  }
}

// What wgmma reads as element (row, dim) of a K-major operand: the canonical layout of the manual,
// Swizzle<3,4,3> o ((8, m), (8, 2)) : ((64, SBO), (1, 8)) for elements of two bytes, applied to addresses. With smaller
// or larger ones, a row's 8 are as many as 16 bytes hold.
template <typename T>
T operand(const SharedMemory& shared, uint64_t descriptor, int row, int dim) {
  const auto field = [&](int first, int bits) {
    return static_cast<uint32_t>(descriptor >> first) & ((1u << bits) - 1);
  };
  EXPECT(field(62, 2) == 1 && field(49, 3) == 0, "128-byte swizzle, aligned pattern");
  const int per_chunk = 16 / sizeof(T);
  const uint32_t start = field(0, 14) << 4, stride = field(32, 14) << 4;
  uint32_t address = start + row % 8 * 128 + row / 8 * stride + dim / per_chunk * 16 + dim % per_chunk * sizeof(T);
  address ^= (address >> 7 & 7) << 4;
  EXPECT(address + sizeof(T) <= shared.size(), "inside of shared memory");
  T value;
  memcpy(&value, &shared[address], sizeof(T));
  return value;
}

// Layout of elements whose bits are a T.
template <typename T>
void test_layout(Operand type, int instruction_dims) {
  EXPECT(element_bytes(type) == sizeof(T) && row_elements(type) == kRowInstructions * instruction_dims, "sizes");
  std::mt19937 random(1);
  MatrixOf<T> matrix(300, 200);
  for (auto& x : matrix.element) x = static_cast<T>(random());
  SharedMemory shared(kSharedEnd);
  for (const uint32_t target : {0u, 1024u, 5u * 1024, 160u * 1024, 190u * 1024}) {
    for (const int first_row : {0, 64, 280}) {
      for (const int first_dim : {0, row_elements(type), 192}) {
        copy_box(shared, target, matrix, first_dim, first_row, 64);
        const uint64_t descriptor = matrix_descriptor(target);
        for (int part = 0; part < kRowInstructions; ++part) {
          for (int row = 0; row < 64; ++row) {
            for (int d = 0; d < instruction_dims; ++d) {
              const int dim = part * instruction_dims + d;
              const T expected = matrix.at_or_zero(first_row + row, first_dim + dim);
              EXPECT(operand<T>(shared, deeper(descriptor, part), row, d) == expected, "row %d dim %d", row, dim);
              T placed;
              memcpy(&placed, &shared[target + tile_offset(type, row, dim)], sizeof(T));
              EXPECT(placed == expected, "tile_offset of row %d dim %d", row, dim);
            }
          }
        }
      }
    }
  }
}

void test_layouts() {
  static_assert(tile_offset(Operand::kBfloat16, 0, 8) == 16 && tile_offset(Operand::kBfloat16, 1, 0) == 128 + 16 &&
                tile_offset(Operand::kBfloat16, 9, 63) == 9 * 128 + 6 * 16 + 14);
  static_assert(tile_offset(Operand::kTfloat32, 9, 31) == 9 * 128 + 6 * 16 + 12);
  static_assert(tile_offset(Operand::kInt8, 9, 127) == 9 * 128 + 6 * 16 + 15);
  static_assert(std::is_same_v<OperandSum<Operand::kInt8>, int32_t> &&
                std::is_same_v<OperandSum<Operand::kBfloat16>, float>);
  // K of m64n256: k16, k8 and k32.
  test_layout<uint16_t>(Operand::kBfloat16, 16);
  test_layout<uint16_t>(Operand::kFloat16, 16);
  test_layout<uint32_t>(Operand::kTfloat32, 8);
  test_layout<uint8_t>(Operand::kInt8, 32);
}

// The accumulator's fragment in the manual: thread 4 g + q of warp w has rows 16 w + g and 16 w + g + 8, and columns 2
// q and 2 q + 1 of every 8. Its registers run over these columns, then rows, then the next 8 columns.
void test_accumulators() {
  std::vector<int> owner(64 * kTileTokens, -1);
  for (int thread = 0; thread < kWarpgroupThreads; ++thread) {
    const int w = thread / 32, g = thread % 32 / 4, q = thread % 4;
    int i = 0;
    for (int eight = 0; eight < kTileTokens / 8; ++eight) {
      for (const int row : {16 * w + g, 16 * w + g + 8}) {
        for (const int column : {8 * eight + 2 * q, 8 * eight + 2 * q + 1}) {
          EXPECT(accumulator_row(thread, i) == row && accumulator_column(thread, i) == column, "thread %d, %d", thread,
                 i);
          EXPECT(owner[row * kTileTokens + column] == -1, "one owner");
          owner[row * kTileTokens + column] = thread;
          ++i;
        }
      }
    }
    EXPECT(i == kAccumulators, "%d accumulators", i);
  }
}

// Rules ----------------------------------------------------------------------------------------------------------

void test_rules() {
  static_assert(kSharedBytes == 4 * (16 + 32) * 1024 + 64 + 1024);
  static_assert(empty_arrivals(1) == 8 && empty_arrivals(2) == 16);
  const auto fits_bfloat16 = [](const Shape& shape, uintptr_t addresses) {
    return fits(shape, Operand::kBfloat16, addresses);
  };
  EXPECT(fits_bfloat16({1, 1, 1, 8}, 32), "the smallest");
  EXPECT(fits_bfloat16({32768, 128, 250002, 4096}, 16), "large");
  EXPECT(!fits_bfloat16({1, 1, 1, 4}, 32) && !fits_bfloat16({1, 1, 1, 20}, 32), "rows of whole 16 bytes");
  EXPECT(fits({1, 1, 1, 4}, Operand::kTfloat32, 0) && !fits({1, 1, 1, 6}, Operand::kTfloat32, 0), "of float32");
  EXPECT(fits({1, 1, 1, 16}, Operand::kInt8, 0) && !fits({1, 1, 1, 8}, Operand::kInt8, 0), "of one byte");
  EXPECT(!fits_bfloat16({1, 1, 1, 8}, 8), "aligned");
  EXPECT(!fits_bfloat16({0, 1, 1, 8}, 0) && !fits_bfloat16({1, 0, 1, 8}, 0) && !fits_bfloat16({1, 1, 0, 8}, 0) &&
             !fits_bfloat16({1, 1, 1, 0}, 0),
         "empty");
  EXPECT(!fits_bfloat16({int64_t{1} << 31, 1, 1, 8}, 0) && !fits_bfloat16({1 << 30, 1, 1 << 30, 8}, 0), "too large");
  EXPECT(choose_cluster(128) == 1 && choose_cluster(129) == 2, "clusters");
  EXPECT(token_tiles({256, 1, 1, 8}) == 1 && token_tiles({257, 1, 1, 8}) == 2, "tiles");
  EXPECT(key_bytes({1000, 2, 10, 8}, true) == 2 * 10 * 8 && key_bytes({1000, 9, 10, 8}, false) == 4 * 10 * 4, "keys");
}

void test_order() {
  for (const int cluster : {1, 2}) {
    for (const int vocabulary : {1, 128, 129, 256, 1000, 30522}) {
      for (const int rows : {0, 1, 256, 257, 2048, 2049, 10000}) {
        const TileOrder order = TileOrder::of(vocabulary, rows, cluster);
        const int entries = (vocabulary + 128 * cluster - 1) / (128 * cluster), tokens = (rows + 255) / 256;
        EXPECT(order.count() == static_cast<int64_t>(entries) * tokens, "count");
        std::vector<int> seen(order.count());
        for (int i = 0; i < order.count(); ++i) {
          const Tile tile = order.at(i);
          EXPECT(tile.entry >= 0 && tile.entry < entries && tile.token >= 0 && tile.token < tokens, "inside");
          EXPECT(tile.token / TileOrder::kGroup == i / (TileOrder::kGroup * entries), "group after group");
          EXPECT(seen[static_cast<size_t>(tile.entry) * tokens + tile.token]++ == 0, "once");
        }
      }
    }
  }
}

void test_keys() {
  const float inf = INFINITY, nan = NAN;
  const std::vector<float> rising{-inf, -3e38f, -1.0f, -1e-45f, 0.0f, 1e-45f, 1.0f, 3e38f, inf, nan};
  for (size_t i = 0; i < rising.size(); ++i) {
    EXPECT(make_key<true>(rising[i], 7) != 0 && make_key<false>(rising[i], 7) != 0, "0 stands for no row");
    EXPECT(make_key<true>(rising[i], 7) > make_key<true>(rising[i], 8), "lower position first");
    const float back = value_of(make_key<true>(rising[i], 7)), also = value_of(make_key<false>(rising[i], 7));
    EXPECT(to_bits(back) == to_bits(also) && (back == rising[i] || (std::isnan(back) && i == 9)), "value back");
    EXPECT(position_of(make_key<true>(rising[i], 7)) == 7, "position back");
    EXPECT(moved_to(make_key<true>(rising[i], 7), 9) == make_key<true>(rising[i], 9), "moved");
    for (size_t j = 0; j < i; ++j) {
      EXPECT(make_key<true>(rising[i], 9) > make_key<true>(rising[j], 3), "order");
      EXPECT(make_key<false>(rising[i], 9) > make_key<false>(rising[j], 3), "order");
    }
  }
  EXPECT(make_key<true>(-0.0f, 3) == make_key<true>(0.0f, 3), "zeros are equal");
}

void test_sequences_of_a_tile() {
  EXPECT(lies_in_one_tile(0, 256) && lies_in_one_tile(256, 257) && lies_in_one_tile(300, 512), "in one");
  EXPECT(!lies_in_one_tile(255, 257) && !lies_in_one_tile(0, 257), "in two");
  EXPECT(!lies_in_one_tile(3, 3) && !lies_in_one_tile(256, 0), "in none");
  const std::vector<int32_t> starts{0, 0, 4, 4, 256, 700};
  EXPECT(first_sequence_after(starts.data(), 5, 0) == 1 && first_sequence_after(starts.data(), 5, 3) == 1, "first");
  EXPECT(first_sequence_after(starts.data(), 5, 4) == 3 && first_sequence_after(starts.data(), 5, 256) == 4, "middle");
  EXPECT(first_sequence_after(starts.data(), 5, 700) == 5, "none is left");
}

// The stages -----------------------------------------------------------------------------------------------------

// A barrier that counts arrivals and bytes, and knows the parity of its current phase.
struct Barrier {
  int arrivals, pending, bytes = 0;
  uint32_t phase = 0;

  explicit Barrier(int arrivals) : arrivals(arrivals), pending(arrivals) {}
  void arrive(int expected = 0) {
    bytes += expected;
    EXPECT(--pending >= 0, "more arrivals than the phase has");
    flip();
  }
  void complete(int count) {
    bytes -= count;
    flip();
  }
  void flip() {
    if (pending > 0 || bytes != 0) return;
    pending = arrivals;
    ++phase;
  }
  bool passes(uint32_t parity) const { return phase % 2 != parity; }
};

// Blocks of a cluster, each with a copying thread and 8 reading warps, run interleaved at random, and copies land late.
// Every warp must read the data of every step, and no data may be replaced before all warps have read it.
void test_stages(int cluster, int steps, unsigned seed) {
  std::mt19937 random(seed);
  constexpr int kWarps = kConsumers * 4;
  struct Copy {
    int block, stage, step, half, bytes;
  };
  struct Warp {
    Ring<kStages> ring;
    int step = 0, unreleased = -1;
  };
  struct Block {
    std::vector<Barrier> full, empty;
    int content[kStages][3];  // which step's entries, and halves of tokens
    Ring<kStages> ring;
    int step = 0;
    std::vector<Warp> warps{kWarps};
  };
  std::vector<Block> blocks(cluster);
  for (Block& block : blocks) {
    block.full.assign(kStages, Barrier(1));
    block.empty.assign(kStages, Barrier(empty_arrivals(cluster)));
    for (auto& stage : block.content) stage[0] = stage[1] = stage[2] = -1;
  }
  std::vector<Copy> under_way;
  const auto release = [&](int stage) {
    for (Block& other : blocks) other.empty[stage].arrive();
  };
  int idle = 0, finished = 0;
  const int actors = cluster * (1 + kWarps);
  while (finished < actors || !under_way.empty()) {
    EXPECT(++idle < 1000000, "stuck");
    const int choice = static_cast<int>(random() % (actors + 2));
    if (choice >= actors) {
      if (under_way.empty()) continue;
      const size_t i = random() % under_way.size();
      const Copy copy = under_way[i];
      under_way.erase(under_way.begin() + static_cast<long>(i));
      int& slot = blocks[copy.block].content[copy.stage][copy.half];
      EXPECT(slot == copy.step - kStages || slot == -1, "replaces what is one turn older");
      slot = copy.step;
      blocks[copy.block].full[copy.stage].complete(copy.bytes);
      idle = 0;
      continue;
    }
    const int number = choice / (1 + kWarps), actor = choice % (1 + kWarps);
    Block& block = blocks[number];
    if (actor == 0) {
      if (block.step == steps || !block.empty[block.ring.stage].passes(block.ring.parity ^ 1)) continue;
      block.full[block.ring.stage].arrive(kStageBytes);
      under_way.push_back({number, block.ring.stage, block.step, 0, kEntryBytes});
      for (int other = 0; other < cluster; ++other) {
        if (cluster == 1) {
          under_way.push_back({0, block.ring.stage, block.step, 1, kTokenBytes / 2});
          under_way.push_back({0, block.ring.stage, block.step, 2, kTokenBytes / 2});
        } else {
          under_way.push_back({other, block.ring.stage, block.step, 1 + number, kTokenBytes / cluster});
        }
      }
      block.ring.advance();
      finished += ++block.step == steps;
    } else {
      Warp& warp = block.warps[actor - 1];
      if (warp.step == steps || !block.full[warp.ring.stage].passes(warp.ring.parity)) continue;
      for (const int step : block.content[warp.ring.stage]) EXPECT(step == warp.step, "reads its own step");
      // A stage is released one step later, when its wgmmas have certainly ended.
      if (warp.unreleased >= 0) {
        for (const int step : block.content[warp.unreleased]) EXPECT(step == warp.step - 1, "was left alone till now");
        release(warp.unreleased);
      }
      warp.unreleased = warp.ring.stage;
      warp.ring.advance();
      if (++warp.step == steps) {
        release(warp.unreleased);
        ++finished;
      }
    }
    idle = 0;
  }
}

// The whole forward ----------------------------------------------------------------------------------------------

struct Results {
  std::vector<float> value;
  std::vector<int> position, writes;
  std::vector<uint8_t> counted;

  explicit Results(size_t count) : value(count, NAN), position(count, -1), writes(count), counted(count) {}
};

template <bool kPositions>
struct HostSink {
  Results& results;
  std::vector<MaxKey<kPositions>>& keys;
  int vocabulary;

  size_t at(int row, int entry) const { return static_cast<size_t>(row) * vocabulary + entry; }
  void store(int sequence, int entry, float value, int position, bool counted) {
    results.value[at(sequence, entry)] = value;
    results.position[at(sequence, entry)] = position;
    results.counted[at(sequence, entry)] = counted;
    ++results.writes[at(sequence, entry)];
  }
  void merge(int slot, int entry, MaxKey<kPositions> key) {
    EXPECT(slot >= 0 && at(slot, entry) < keys.size(), "slot %d", slot);
    keys[at(slot, entry)] = std::max(keys[at(slot, entry)], key);
  }
  MaxKey<kPositions> merged(int slot, int entry) const { return keys[at(slot, entry)]; }
};

// Compute one tile as a block does: by copies, wgmmas of two warpgroups, and a reduction by quads of threads.
template <bool kPositions>
void run_tile(const Matrix& weight, const Matrix& tokens, const PackedRows& rows, const Tile& tile, int cluster,
              int rank, HostSink<kPositions>& sink) {
  const int first_row = tile.token * kTileTokens, first_entry = (tile.entry * cluster + rank) * kTileEntries;
  SharedMemory shared(kStageBytes);
  std::vector<float> product(static_cast<size_t>(kTileEntries) * kTileTokens);
  for (int dim = 0; dim < weight.dim; dim += kTileDims) {
    copy_box(shared, 0, weight, dim, first_entry, kTileEntries);
    for (int half = 0; half < cluster; ++half) {
      copy_box(shared, kEntryBytes + half * (kTokenBytes / cluster), tokens, dim,
               first_row + half * (kTileTokens / cluster), kTileTokens / cluster);
    }
    for (int group = 0; group < kConsumers; ++group) {
      const uint64_t own = matrix_descriptor(group * (kEntryBytes / kConsumers));
      const uint64_t all = matrix_descriptor(kEntryBytes);
      for (int part = 0; part < kRowInstructions; ++part) {
        std::vector<float> a(64 * 16), b(kTileTokens * 16);
        for (int r = 0; r < 64; ++r) {
          for (int d = 0; d < 16; ++d)
            a[r * 16 + d] = from_bfloat16(operand<uint16_t>(shared, deeper(own, part), r, d));
        }
        for (int r = 0; r < kTileTokens; ++r) {
          for (int d = 0; d < 16; ++d)
            b[r * 16 + d] = from_bfloat16(operand<uint16_t>(shared, deeper(all, part), r, d));
        }
        for (int m = 0; m < 64; ++m) {
          for (int n = 0; n < kTileTokens; ++n) {
            float& sum = product[static_cast<size_t>(group * 64 + m) * kTileTokens + n];
            for (int d = 0; d < 16; ++d) sum += a[m * 16 + d] * b[n * 16 + d];
          }
        }
      }
    }
  }
  const int first_sequence = first_sequence_after(rows.starts, rows.batch, first_row);
  for (int quad = 0; quad < kConsumers * kWarpgroupThreads / 4; ++quad) {
    float accumulators[4][kAccumulators];
    const int group = quad / (kWarpgroupThreads / 4), first_thread = quad % (kWarpgroupThreads / 4) * 4;
    for (int q = 0; q < 4; ++q) {
      for (int i = 0; i < kAccumulators; ++i) {
        const int row = accumulator_row(first_thread + q, i), column = accumulator_column(first_thread + q, i);
        accumulators[q][i] = product[static_cast<size_t>(group * 64 + row) * kTileTokens + column];
      }
    }
    for_each_segment(rows.starts, rows.batch, first_sequence, first_row, [&](const Segment& segment) {
      MaxKey<kPositions> of_thread[2], key[2] = {0, 0};
      for (int q = 0; q < 4; ++q) {
        max_of_segment<kPositions>(accumulators[q], first_thread + q, segment, of_thread);
        for (int half = 0; half < 2; ++half) key[half] = std::max(key[half], of_thread[half]);
      }
      for (int half = 0; half < 2; ++half) {
        const int entry = first_entry + group * 64 + accumulator_row(first_thread, 2 * half);
        if (entry < sink.vocabulary) emit(rows, segment, first_row, entry, key[half], sink);
      }
    });
  }
}

struct Case {
  std::vector<int> lengths;  // number of real tokens of each sequence
  int vocabulary, dim;
  bool padded;  // whether rows come from a padded batch with holes
  int special;  // one in `special` elements is inf or NaN; 0 for none
  int room;     // number of rows beyond the last sequence, filled with NaN
};

template <bool kPositions>
void run_case(const Case& test, unsigned seed) {
  std::mt19937 random(seed);
  const int batch = static_cast<int>(test.lengths.size());
  std::vector<int32_t> starts{0};
  for (const int length : test.lengths) starts.push_back(starts.back() + length);
  const int counted_rows = starts.back(), capacity = counted_rows + test.room;
  int longest = 0;
  for (const int length : test.lengths) longest = std::max(longest, length);
  const int padded_length = 2 * longest + 3;
  std::vector<int32_t> source_rows(capacity, -1);
  std::vector<int> true_position(capacity, -1);
  for (int b = 0; b < batch; ++b) {
    int position = -1;
    for (int row = starts[b]; row < starts[b + 1]; ++row) {
      position += 1 + (test.padded && random() % 3 == 0 && position + 1 + starts[b + 1] - row < padded_length);
      true_position[row] = position;
      source_rows[row] = b * padded_length + position;
    }
  }
  // The few different values give many ties, and sums that are exact in any order.
  Matrix weight(test.vocabulary, test.dim), tokens(capacity, test.dim);
  const auto fill = [&](Matrix& matrix) {
    for (auto& x : matrix.element) {
      x = to_bfloat16(static_cast<float>(static_cast<int>(random() % 5) - 2));
      if (test.special > 0 && random() % test.special == 0) {
        x = to_bfloat16(random() % 3 == 0 ? NAN : random() % 2 == 0 ? INFINITY : -INFINITY);
      }
    }
  };
  fill(weight);
  fill(tokens);
  for (int row = counted_rows; row < capacity; ++row) {
    for (int d = 0; d < test.dim; ++d) tokens.at(row, d) = to_bfloat16(NAN);
  }
  const Shape shape{capacity, batch, test.vocabulary, test.dim};
  EXPECT(fits(shape, Operand::kBfloat16, 0), "the kernel would run");
  const PackedRows rows{starts.data(), test.padded ? source_rows.data() : nullptr, padded_length, batch,
                        static_cast<int>(token_tiles(shape))};
  Results results(static_cast<size_t>(batch) * test.vocabulary);
  std::vector<MaxKey<kPositions>> keys(key_bytes(shape, kPositions) / sizeof(MaxKey<kPositions>));
  HostSink<kPositions> sink{results, keys, test.vocabulary};
  const int cluster = choose_cluster(test.vocabulary);
  const TileOrder order = TileOrder::of(test.vocabulary, counted_rows, cluster);
  std::vector<int> turns(order.count());
  for (size_t i = 0; i < turns.size(); ++i) turns[i] = static_cast<int>(i);
  std::shuffle(turns.begin(), turns.end(), random);
  for (const int turn : turns) {
    for (int rank = 0; rank < cluster; ++rank) run_tile(weight, tokens, rows, order.at(turn), cluster, rank, sink);
  }
  for (int b = 0; b < batch; ++b) {
    for (int v = 0; v < test.vocabulary; ++v) store_remaining(rows, b, v, sink);
  }

  for (int b = 0; b < batch; ++b) {
    for (int v = 0; v < test.vocabulary; ++v) {
      float best = -INFINITY;
      int position = 0;
      bool counted = false;
      for (int row = starts[b]; row < starts[b + 1]; ++row) {
        float logit = 0;
        for (int d = 0; d < test.dim; ++d) logit += from_bfloat16(weight.at(v, d)) * from_bfloat16(tokens.at(row, d));
        if (!counted || (!std::isnan(best) && (std::isnan(logit) || logit > best))) {
          best = logit;
          position = test.padded ? true_position[row] : row - starts[b];
        }
        counted = true;
      }
      const size_t i = static_cast<size_t>(b) * test.vocabulary + v;
      EXPECT(results.writes[i] == 1, "sequence %d entry %d was written %d times", b, v, results.writes[i]);
      EXPECT(results.value[i] == best || (std::isnan(best) && std::isnan(results.value[i])), "sequence %d entry %d", b,
             v);
      EXPECT(results.counted[i] == counted, "sequence %d counts", b);
      EXPECT(!kPositions || results.position[i] == position, "sequence %d entry %d: position %d, not %d", b, v,
             results.position[i], position);
    }
  }
}

void test_forward() {
  const std::vector<Case> cases{
      {{1}, 1, 8, false, 0, 0},
      {{256}, 128, 64, false, 0, 0},
      {{256, 256}, 130, 72, false, 0, 300},
      {{255, 1, 1, 255}, 60, 8, false, 50, 0},
      {{0, 0, 5, 0, 600, 0, 24, 24, 24, 0}, 200, 40, false, 0, 1},
      {{0, 0, 5, 0, 600, 0, 24, 24, 24, 0}, 200, 40, true, 90, 77},
      {{0, 0}, 10, 8, true, 0, 12},
      {{700}, 300, 16, true, 40, 0},
      {{1000, 3}, 20, 8, false, 3, 0},  // hardly anything is finite
      {{3, 2, 1, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 40}, 100, 24, false, 0, 5},
      {std::vector<int>(300, 1), 40, 8, false, 20, 0},
      {std::vector<int>(40, 24), 140, 8, true, 0, 0},
  };
  unsigned seed = 0;
  for (const Case& test : cases) {
    run_case<true>(test, ++seed);
    run_case<false>(test, ++seed);
  }
  std::mt19937 random(99);
  for (int turn = 0; turn < 25; ++turn) {
    Case test{{},
              static_cast<int>(1 + random() % 140),
              static_cast<int>(8 * (1 + random() % 4)),
              random() % 2 == 0,
              random() % 2 == 0 ? 30 : 0,
              static_cast<int>(random() % 300)};
    const int longest = random() % 2 == 0 ? 30 : 500;
    for (int rows = 0; rows < 700; rows += test.lengths.back()) {
      test.lengths.push_back(random() % 4 == 0 ? 0 : static_cast<int>(random() % longest));
    }
    run_case<true>(test, ++seed);
  }
}

// The device cannot check the values of cu_seqlens. Whatever they are, only outputs and keys may be written.
void test_disorder() {
  std::mt19937 random(5);
  for (int turn = 0; turn < 200; ++turn) {
    const int batch = static_cast<int>(1 + random() % 8), capacity = static_cast<int>(1 + random() % 1500);
    std::vector<int32_t> starts(batch + 1);
    for (auto& start : starts) start = static_cast<int32_t>(random() % (capacity + 1));
    const Shape shape{capacity, batch, 3, 8};
    const PackedRows rows{starts.data(), nullptr, 0, batch, static_cast<int>(token_tiles(shape))};
    Results results(static_cast<size_t>(batch) * 3);
    std::vector<MaxKey<true>> keys(key_bytes(shape, true) / 8);
    HostSink<true> sink{results, keys, 3};
    for (int row = 0; row < starts[batch]; row += kTileTokens) {
      const int first_sequence = first_sequence_after(starts.data(), batch, row);
      EXPECT(first_sequence >= 0 && first_sequence <= batch, "a sequence or none");
      for_each_segment(starts.data(), batch, first_sequence, row, [&](const Segment& segment) {
        EXPECT(segment.first >= 0 && segment.first < segment.last && segment.last <= kTileTokens, "columns");
        emit(rows, segment, row, 2, make_key<true>(1.0f, static_cast<uint32_t>(segment.first)), sink);
      });
    }
    for (int b = 0; b < batch; ++b) store_remaining(rows, b, 2, sink);
  }
}

}  // namespace

int main() {
  test_layouts();
  test_accumulators();
  test_rules();
  test_order();
  test_keys();
  test_sequences_of_a_tile();
  for (const int cluster : {1, 2}) {
    for (const int steps : {1, 3, 4, 5, 50}) {
      for (unsigned seed = 0; seed < 20; ++seed) test_stages(cluster, steps, seed);
    }
  }
  test_forward();
  test_disorder();
  return 0;
}
