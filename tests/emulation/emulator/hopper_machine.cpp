#include "hopper_machine.h"

namespace emulation::hopper {
namespace {

constexpr int kBoxBytes = 128;  // of a row of a tile
constexpr int kChunkBytes = 16;
constexpr uint32_t kPatternBytes = 1024;

Machine* running = nullptr;
bool expects_written_memory = false;

// Whether torch's deterministic mode filled these bytes: with NaN, or with the largest integer.
bool is_filled(const uint8_t* bytes, int64_t count) {
  constexpr uint8_t kPatterns[][4]{{0xc0, 0x7f, 0xc0, 0x7f},
                                   {0x00, 0x7e, 0x00, 0x7e},
                                   {0, 0, 0xc0, 0x7f},
                                   {0x7f, 0x7f, 0x7f, 0x7f},
                                   {0xff, 0xff, 0xff, 0xff}};
  for (const auto& pattern : kPatterns) {
    int64_t same = 0;
    while (same < count && bytes[same] == pattern[same % 4]) ++same;
    if (same == count) return true;
  }
  return false;
}

void expect_written(const CUtensorMap& map, int dim, int first_row) {
  const int64_t first_byte = int64_t{dim} * map.element_bytes, rest = map.dim * map.element_bytes - first_byte;
  if (rest <= 0) return;
  for (int64_t row = first_row; row < first_row + map.box_rows && row < map.rows; ++row) {
    if (is_filled(map.data + row * map.row_bytes + first_byte, rest < kBoxBytes ? rest : kBoxBytes)) {
      fail("a tensor copy reads memory that nothing wrote");
    }
  }
}

}  // namespace

// For the tests, by ctypes: whether copies of memory that only torch's deterministic mode has filled are mistakes.
extern "C" __attribute__((visibility("default"))) void emulation_expect_written_memory(bool expects) {
  expects_written_memory = expects;
}

void MemoryBarrier::end_phase_if_complete() {
  if (pending > 0 || bytes != 0) return;
  pending = arrivals;
  ++phase;
}

Machine::Machine(int blocks, size_t shared_bytes) : blocks_(blocks), shared_bytes_(shared_bytes) {
  running = this;
  set_engine(this);
}

Machine::~Machine() {
  set_engine(nullptr);
  running = nullptr;
}

Machine& Machine::current() { return *running; }

uint32_t Machine::shared_start() { return SharedMemory::kStart; }

void Machine::begin() {
  const size_t blocks = static_cast<size_t>(blocks_);
  memory_.clear();
  for (size_t block = 0; block < blocks; ++block) memory_.emplace_back(shared_bytes_);
  barriers_.assign(blocks, {});
  warpgroups_.clear();
  for (const SharedMemory& memory : memory_) {
    for (int i = 0; i < threads_per_block() / kWarpgroupThreads; ++i) warpgroups_.emplace_back(memory);
  }
  copies_.clear();
  cluster_arrived_ = 0;
}

bool Machine::step() {
  if (copies_.empty()) return false;
  const auto next = copies_.begin() + random_below(static_cast<uint32_t>(copies_.size()));
  const Copy copy = *next;
  copies_.erase(next);
  run(copy);
  return true;
}

void Machine::end() {
  if (!copies_.empty()) fail("a block has ended before a copy to it");
}

// Barriers -------------------------------------------------------------------------------------------------------

void Machine::init_barrier(uint32_t address, int arrivals) {
  if (address % 8 != 0 || address + 8 > SharedMemory::kStart + shared_bytes_) fail("address of a barrier");
  const race::Unseen unseen;
  barriers_[static_cast<size_t>(current_block())][address] = {arrivals, arrivals, 0, 0, {}};
}

MemoryBarrier& Machine::barrier(int block, uint32_t address) {
  auto& barriers = barriers_.at(static_cast<size_t>(block));
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("a barrier that was not initialised");
  return found->second;
}

void Machine::arrive(int block, uint32_t address, int bytes) {
  MemoryBarrier& target = barrier(block, address);
  target.order[target.phase % 2].release();
  target.bytes += bytes;
  if (--target.pending < 0) fail("more arrivals than the barrier counts");
  target.end_phase_if_complete();
}

void Machine::wait(uint32_t address, unsigned parity) {
  const int block = current_block();
  wait_until([this, block, address, parity] { return barrier(block, address).phase % 2 != parity; });
  barrier(block, address).order[parity].acquire();
}

void Machine::cluster_barrier() {
  const unsigned generation = cluster_generation_;
  const race::Order order = cluster_order_[generation % 2];
  order.release();
  if (++cluster_arrived_ == blocks_ * threads_per_block()) {
    cluster_arrived_ = 0;
    ++cluster_generation_;
  }
  wait_until([this, generation] { return cluster_generation_ != generation; });
  order.acquire();
}

// Tensor copies --------------------------------------------------------------------------------------------------

void Machine::copy(uint32_t target, const CUtensorMap& map, int dim, int row, uint32_t barrier, unsigned blocks) {
  const race::Unseen unseen;
  const race::Order issued;
  issued.release();
  for (int block = 0; block < kMaxBlocks; ++block) {
    if (blocks >> block & 1) copies_.push_back({block, target, map, dim, row, barrier, issued});
  }
}

// With the 128-byte swizzle: of every 8 rows of 128 bytes, the 16-byte chunk c of row r lands at chunk c ^ r. What is
// outside of the matrix reads as 0. Elements are copied bit by bit: of float32 as TF32 the real engine may round the
// bits that wgmma ignores.
void Machine::run(const Copy& copy) {
  if (copy.target % kPatternBytes != 0) fail("a copy to where the swizzle's pattern does not begin");
  const SharedMemory& memory = memory_.at(static_cast<size_t>(copy.block));
  const race::Turn turn(engine_);
  copy.issued.acquire();
  for (int r = 0; r < copy.map.box_rows; ++r) {
    const int64_t row = copy.row + r, first_byte = int64_t{copy.dim} * copy.map.element_bytes;
    for (int byte = 0; byte < kBoxBytes; byte += kChunkBytes) {
      uint8_t chunk[kChunkBytes]{};
      const int64_t in_row = copy.map.dim * copy.map.element_bytes - first_byte - byte;
      if (row >= 0 && row < copy.map.rows && first_byte >= 0 && in_row > 0) {
        const int64_t size = in_row < kChunkBytes ? in_row : kChunkBytes;
        const uint8_t* const source = copy.map.data + row * copy.map.row_bytes + first_byte + byte;
        race::read(source, static_cast<size_t>(size));
        std::memcpy(chunk, source, static_cast<size_t>(size));
      }
      const int target = r * kBoxBytes + (byte / kChunkBytes ^ r % 8) * kChunkBytes;
      memory.store(copy.target + static_cast<uint32_t>(target), chunk, sizeof(chunk));
    }
  }
  if (expects_written_memory) expect_written(copy.map, copy.dim, copy.row);
  MemoryBarrier& done = barrier(copy.block, copy.barrier);
  done.order[done.phase % 2].release();
  done.bytes -= copy.map.box_rows * kBoxBytes;
  done.end_phase_if_complete();
}

// Tensor cores ---------------------------------------------------------------------------------------------------

Warpgroup& Machine::warpgroup() { return warpgroups_[static_cast<size_t>(current_thread() / kWarpgroupThreads)]; }

}  // namespace emulation::hopper

// The driver's function, with the limits that CUDA's manual gives for such maps.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  using namespace emulation::hopper;
  constexpr cuuint64_t kMaxSize = cuuint64_t{1} << 32, kMaxStride = cuuint64_t{1} << 40;
  const int element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8      ? 1
                            : type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 ? 4
                                                                       : 2;
  const bool fits = rank == 2 && reinterpret_cast<uintptr_t>(address) % 16 == 0 && strides[0] % 16 == 0 &&
                    strides[0] < kMaxStride && sizes[0] > 0 && sizes[0] <= kMaxSize && sizes[1] > 0 &&
                    sizes[1] <= kMaxSize && box[0] * static_cast<cuuint32_t>(element_bytes) == kBoxBytes &&
                    box[1] > 0 && box[1] <= 256 && element_strides[0] == 1 && element_strides[1] == 1 &&
                    swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  if (!fits) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const uint8_t*>(address), static_cast<int64_t>(sizes[1]), static_cast<int64_t>(sizes[0]),
          static_cast<int64_t>(strides[0]),     static_cast<int>(box[1]),       element_bytes};
  return CUDA_SUCCESS;
}
