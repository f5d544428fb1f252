// gather on CUDA: rows of several tables, read and written in one launch.
//
// A row is copied by the widest accesses that its size and the addresses allow, with a thread for each of them, up to a
// block. Tables lie in device memory or in pinned host memory, which the GPU reads in place.
//
// An index out of range must refuse the whole write, and of several writes to one row the last one must win, both
// without the host. So a launch in front of the write stops at a bad index by a device-side assertion, after which
// nothing runs, and notes the last write to each row.
//
// The update of a cache writes the refreshed rows and makes their slots young; blocks select the oldest slots of their
// part of the cache; every slot ages; one block selects and sorts the oldest of all parts and gives them to the new
// items, whose rows go there.
#include <torch/csrc/stable/library.h>

#include "common/gather.h"
#include "cuda/common.cuh"
#include "cuda/host_tables.h"
#include "cuda/selection.cuh"

namespace splade_fast::cuda {
namespace {

constexpr int kThreads = 128, kThreadBits = 7;
constexpr int64_t kMinPart = 8192;  // slots of a block that selects the oldest
constexpr int kMaxTables = 48;      // in a launch: the arguments of a kernel have 4 KiB

struct Copy {
  const uint8_t* source;
  uint8_t* target;
  int64_t source_stride, target_stride, bytes;  // of a row
  int width;                                    // bytes of an access
  int lane_bits;                                // 2^lane_bits threads copy a row
};

struct Copies {
  Copy table[kMaxTables];
  unsigned count;
};

// The row of this thread in a launch, and its number among the threads of the row.
struct Lane {
  int64_t row;
  int number;

  __device__ explicit Lane(const Copy& copy)
      : row((static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) >> copy.lane_bits),
        number(static_cast<int>(threadIdx.x) & ((1 << copy.lane_bits) - 1)) {}
};

template <typename Access>
__device__ void copy_by(const uint8_t* source, uint8_t* target, const Copy& copy, int lane) {
  const Access* from = reinterpret_cast<const Access*>(source);
  Access* to = reinterpret_cast<Access*>(target);
  const int64_t count = copy.bytes / static_cast<int64_t>(sizeof(Access));
  const int lanes = 1 << copy.lane_bits;
#pragma unroll 4
  for (int64_t i = lane; i < count; i += lanes) to[i] = from[i];
}

__device__ void copy_row(const Copy& copy, int64_t from, int64_t to, int lane) {
  const uint8_t* source = copy.source + from * copy.source_stride;
  uint8_t* target = copy.target + to * copy.target_stride;
  if (copy.width == 16) {
    copy_by<uint4>(source, target, copy, lane);
  } else if (copy.width == 8) {
    copy_by<uint2>(source, target, copy, lane);
  } else if (copy.width == 4) {
    copy_by<uint32_t>(source, target, copy, lane);
  } else if (copy.width == 2) {
    copy_by<uint16_t>(source, target, copy, lane);
  } else {
    copy_by<uint8_t>(source, target, copy, lane);
  }
}

__device__ inline bool in_range(int64_t index, int64_t table_rows) { return index >= 0 && index < table_rows; }

// Checks regardless of NDEBUG, as PyTorch checks indices: the next call that waits for the device raises.
__device__ inline void refuse() {
  __assert_fail("indices must be between 0 and the last row of the tables", __FILE__, __LINE__, "splade_fast gather");
}

// blockIdx.y: the table.
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ Copies copies, const int64_t* indices, int64_t count, int64_t table_rows) {
  const Copy& copy = copies.table[blockIdx.y];
  const Lane lane(copy);
  if (lane.row >= count) return;
  const int64_t index = indices[lane.row];
  if (!in_range(index, table_rows)) return refuse();
  copy_row(copy, index, lane.row, lane.number);
}

// Notes in last[row of a table] the number of the last write to it, from 1 on.
__global__ void __launch_bounds__(kThreads)
    last_write_kernel(const int64_t* indices, const bool* mask, int64_t count, int64_t table_rows, unsigned* last) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  // The index under a false mask may be uninitialised.
  if (i >= count || (mask != nullptr && !mask[i])) return;
  if (!in_range(indices[i], table_rows)) return refuse();
  atomicMax(last + indices[i], static_cast<unsigned>(i + 1));
}

// blockIdx.y: the table.
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const __grid_constant__ Copies copies, const int64_t* indices, const bool* mask, int64_t count,
                   const unsigned* last) {  // null: no row is written twice
  const Copy& copy = copies.table[blockIdx.y];
  const Lane lane(copy);
  if (lane.row >= count || (mask != nullptr && !mask[lane.row])) return;
  const int64_t index = indices[lane.row];
  if (last == nullptr || last[index] == lane.row + 1) copy_row(copy, lane.row, index, lane.number);
}

// Ages -----------------------------------------------------------------------------------------------------------

// A slot as a word: older ones are larger, and of equal ages the lower slot is. 0: none.
using Word = uint64_t;

__device__ inline Word to_word(int32_t age, int64_t slot) {
  return static_cast<Word>(static_cast<uint32_t>(age) ^ 0x80000000u) << 32 | ~static_cast<uint32_t>(slot);
}

__device__ inline int64_t slot_of(Word word) { return ~static_cast<uint32_t>(word); }

struct AgeTask {
  int32_t* age;
  bool* valid;
  int64_t slots;
  const int64_t* refreshed;
  const bool* refreshed_mask;
  int64_t refreshed_count;
  const bool* new_mask;
  int64_t new_count;
  int wanted;           // number of oldest slots to find, at most the number of slots
  Word* oldest;         // (candidates,), the oldest of each part
  int64_t candidates;   // at least the number wanted
  int64_t* new_places;  // (new_count,), the slots of the new items
};

// Makes the refreshed slots the youngest.
__global__ void __launch_bounds__(kThreads) refresh_kernel(const AgeTask task) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= task.refreshed_count || (task.refreshed_mask != nullptr && !task.refreshed_mask[i])) return;
  atomicExch(task.age + task.refreshed[i], -1);
}

// A block selects the oldest slots of its part.
__global__ void __launch_bounds__(selection::kThreads, 1) oldest_kernel(const AgeTask task, int64_t per_block) {
  __shared__ selection::Shared<Word> shared;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * per_block;
  Word* target = task.oldest + static_cast<int64_t>(blockIdx.x) * task.wanted;
  const int count = static_cast<int>(min(per_block, task.slots - first));
  const auto load = [&](int i) { return to_word(task.age[first + i], first + i); };
  const auto all = [](Word) { return Word(0); };
  const auto store = [&](int, Word word, int place) { target[place] = word; };
  const int found = selection::select_largest(shared, count, task.wanted, Word(0), load, all, store).count;
  for (int place = found + static_cast<int>(threadIdx.x); place < task.wanted; place += selection::kThreads) {
    target[place] = Word(0);
  }
}

__global__ void __launch_bounds__(kThreads) age_kernel(int32_t* age, int64_t slots) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (slot < slots) age[slot] = static_cast<int32_t>(static_cast<uint32_t>(age[slot]) + 1);
}

// The new item with `rank` others in front of it takes the slot with as many older ones. One block.
__global__ void __launch_bounds__(selection::kThreads, 1) place_kernel(const AgeTask task) {
  __shared__ selection::Shared<Word> shared;
  __shared__ int added_of_warps[selection::kWarps];
  const Word* oldest = selection::sort_largest(shared, task.oldest, static_cast<int>(task.candidates), task.wanted);
  int64_t before = 0;
  for (int64_t tile = 0; tile < task.new_count; tile += selection::kThreads) {
    const int64_t item = tile + threadIdx.x;
    const bool is_added = item < task.new_count && (task.new_mask == nullptr || task.new_mask[item]);
    const Sums<int> added = block_sums(static_cast<int>(is_added), added_of_warps);
    const int64_t rank = before + added.before;
    before += added.total;
    if (!is_added) continue;
    if (rank >= task.wanted) refuse();  // more new items than slots
    const int64_t slot = slot_of(oldest[rank]);
    task.new_places[item] = slot;
    task.age[slot] = 0;
    task.valid[slot] = true;
  }
}

// Host functions -------------------------------------------------------------------------------------------------

int access_width(const Copy& copy) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(copy.source) | reinterpret_cast<uintptr_t>(copy.target) |
                        static_cast<uintptr_t>(copy.source_stride | copy.target_stride | copy.bytes);
  int width = kVectorBytes;
  while (all % static_cast<uintptr_t>(width) != 0) width /= 2;
  return width;
}

// The address of a table on the device: its own in device memory, the mapped one in pinned host memory.
uint8_t* device_address(const Tensor& table, const Tensor& indices, const char* op) {
  if (!is_in_host_memory(table)) {
    STD_TORCH_CHECK(table.device() == indices.device(), "tables must be on the device of indices or in pinned memory");
    return mutable_data<uint8_t>(table);
  }
  if (table.numel() == 0) return nullptr;  // an empty table may have no address, and nothing is copied
  cudaPointerAttributes attributes{};
  check_cuda(cudaPointerGetAttributes(&attributes, table.const_data_ptr()), op);
  STD_TORCH_CHECK(attributes.type == cudaMemoryTypeHost,
                  "tables must be on the device of indices or in pinned memory, got one in pageable host memory");
  return static_cast<uint8_t*>(attributes.devicePointer);
}

// The fewest bits for a thread to each access of a row, or a block.
int lane_bits(const Copy& copy) {
  int bits = 0;
  while (bits < kThreadBits && (copy.width << bits) < copy.bytes) ++bits;
  return bits;
}

// launch(copies, grid) for every kMaxTables tables that have bytes to copy, with threads for `count` rows of each.
template <typename Launch>
void for_each_launch(const std::vector<Copy>& all, int64_t count, Launch launch) {
  Copies copies{};
  int most_bits = 0;
  const auto launch_collected = [&] {
    launch(copies, grid_size(ceil_div(count, kThreads >> most_bits), copies.count));
    copies.count = 0;
    most_bits = 0;
  };
  for (const Copy& copy : all) {
    if (copy.bytes == 0) continue;
    Copy& added = copies.table[copies.count];
    added = copy;
    added.width = access_width(added);
    added.lane_bits = lane_bits(added);
    most_bits = std::max(most_bits, added.lane_bits);
    if (++copies.count == kMaxTables) launch_collected();
  }
  if (copies.count > 0) launch_collected();
}

Tensors gather_rows(const Tensors& tables, const Tensor& indices) {
  const char* op = "gather_rows";
  const int64_t table_rows = check_tables(tables, indices), count = indices.size(0);
  STD_TORCH_CHECK(indices.is_cuda(), "indices must be on the GPU of the tables");
  const OnDevice device(indices, op);
  const Tensor places = as_contiguous(indices);
  Tensors sources, gathered;
  std::vector<Copy> copies;
  for (const Tensor& table : tables) {
    STD_TORCH_CHECK(!is_in_host_memory(table) || has_contiguous_rows(table),
                    "tables in pinned memory must have contiguous rows");
    sources.push_back(has_contiguous_rows(table) ? table : as_contiguous(table));
    const Tensor& source = sources.back();
    std::vector<int64_t> shape(source.sizes().begin(), source.sizes().end());
    shape[0] = count;
    gathered.push_back(new_tensor(indices, shape, source.scalar_type()));
    copies.push_back({device_address(source, indices, op), mutable_data<uint8_t>(gathered.back()),
                      row_stride_bytes(source), row_bytes(source), row_bytes(source), 0, 0});
  }
  if (count == 0) return gathered;
  for_each_launch(copies, count, [&](const Copies& some, dim3 grid) {
    gather_kernel<<<grid, kThreads, 0, device.stream()>>>(some, const_data<int64_t>(places), count, table_rows);
    check_launch(op);
  });
  HostTables::keep(tables, device, op);
  return gathered;
}

// Rows of sources to the first tables, one of each source. last: the number of the last write to each row, or null.
void launch_scatter(const OnDevice& device, const Tensors& sources, const Tensors& tables, const Tensor& places,
                    const std::optional<Tensor>& mask, const unsigned* last, const char* op) {
  const int64_t count = places.size(0);
  std::vector<Copy> copies;
  for (size_t t = 0; t < sources.size(); ++t) {
    copies.push_back({const_data<uint8_t>(sources[t]), device_address(tables[t], places, op), row_bytes(tables[t]),
                      row_stride_bytes(tables[t]), row_bytes(tables[t]), 0, 0});
  }
  const int64_t* indices = const_data<int64_t>(places);
  const bool* flags = mask ? const_data<bool>(*mask) : nullptr;
  for_each_launch(copies, count, [&](const Copies& some, dim3 grid) {
    scatter_kernel<<<grid, kThreads, 0, device.stream()>>>(some, indices, flags, count, last);
    check_launch(op);
  });
}

// The same for any indices, of which several may name one row.
void launch_checked_scatter(const OnDevice& device, const Tensors& sources, const Tensors& tables,
                            const Tensor& indices, const std::optional<Tensor>& mask, int64_t table_rows,
                            const char* op) {
  const int64_t count = indices.size(0);
  if (count == 0) return;
  STD_TORCH_CHECK(count < UINT32_MAX, "indices must be fewer than 2^32 - 1, got ", count);
  const Tensor last_writes = new_zeros_tensor(indices, std::vector<int64_t>{table_rows}, ScalarType::Int);
  unsigned* last = reinterpret_cast<unsigned*>(mutable_data<int32_t>(last_writes));
  last_write_kernel<<<grid_size(ceil_div(count, kThreads)), kThreads, 0, device.stream()>>>(
      const_data<int64_t>(indices), mask ? const_data<bool>(*mask) : nullptr, count, table_rows, last);
  check_launch(op);
  launch_scatter(device, sources, tables, indices, mask, last, op);
}

void scatter_rows_(const Tensors& tables, const Tensor& indices, const Tensors& rows,
                   const std::optional<Tensor>& mask) {
  const char* op = "scatter_rows_";
  const int64_t table_rows = check_scatter(tables, indices, rows, mask);
  STD_TORCH_CHECK(indices.is_cuda(), "indices must be on the GPU of the tables");
  const OnDevice device(indices, op);
  if (tables.empty()) return;
  launch_checked_scatter(device, contiguous_sources(rows, tables), tables, as_contiguous(indices),
                         contiguous_or_none(mask), table_rows, op);
  HostTables::keep(tables, device, op);
}

// How the slots are cut for the blocks that select the oldest: parts much larger than what is kept of them.
struct Parts {
  int64_t count, slots;

  Parts(int64_t all_slots, int64_t wanted, int64_t multiprocessors) {
    const int64_t most = std::min(all_slots / std::max(4 * wanted, kMinPart), multiprocessors);
    slots = ceil_div(all_slots, std::max<int64_t>(most, 1));
    count = ceil_div(all_slots, slots);
  }
};

void update_cache_(const Tensors& tables, const Tensor& age, const Tensor& valid, const Tensors& new_rows,
                   const std::optional<Tensor>& new_mask, const Tensors& refreshed_rows,
                   const std::optional<Tensor>& refreshed_slots, const std::optional<Tensor>& refreshed_mask,
                   bool use_lru) {
  const char* op = "update_cache_";
  const CacheUpdate update{tables, age, valid, new_rows, new_mask, refreshed_rows, refreshed_slots, refreshed_mask};
  check_cache_update(update);
  STD_TORCH_CHECK(age.is_cuda(), "age must be on the GPU of the tables");
  const int64_t slots = update.slots(), new_count = update.new_count();
  const OnDevice device(age, op);
  if (slots == 0) return;
  STD_TORCH_CHECK(slots < INT32_MAX - selection::kTile<Word>, "age must have fewer than 2^31 slots on a GPU, got ",
                  slots);
  const Tensors written = update.written();
  for (const Tensor& table : tables) device_address(table, age, op);  // raise before anything is written
  const Tensors refreshed_sources = contiguous_sources(refreshed_rows, written);
  const Tensors new_sources = contiguous_sources(new_rows, written);
  const std::optional<Tensor> places = contiguous_or_none(refreshed_slots);
  const std::optional<Tensor> mask_of_refreshed = contiguous_or_none(refreshed_mask);
  const std::optional<Tensor> mask_of_new = contiguous_or_none(new_mask);
  if (places) launch_checked_scatter(device, refreshed_sources, tables, *places, mask_of_refreshed, slots, op);

  AgeTask task{};
  task.wanted = static_cast<int>(std::min(new_count, slots));
  const Parts parts(slots, task.wanted, device.multiprocessors());
  task.candidates = parts.count * task.wanted;
  const Tensor oldest = new_tensor(age, std::vector<int64_t>{task.candidates}, ScalarType::Long);
  const Tensor new_places = new_tensor(age, std::vector<int64_t>{new_count}, ScalarType::Long);
  task.age = mutable_data<int32_t>(age);
  task.valid = mutable_data<bool>(valid);
  task.slots = slots;
  if (places) {
    task.refreshed = const_data<int64_t>(*places);
    task.refreshed_mask = mask_of_refreshed ? const_data<bool>(*mask_of_refreshed) : nullptr;
    task.refreshed_count = places->size(0);
  }
  task.new_mask = mask_of_new ? const_data<bool>(*mask_of_new) : nullptr;
  task.new_count = new_count;
  task.oldest = reinterpret_cast<Word*>(mutable_data<int64_t>(oldest));
  task.new_places = mutable_data<int64_t>(new_places);
  const auto blocks_of = [](int64_t count) { return grid_size(ceil_div(count, kThreads)); };
  if (use_lru && task.refreshed_count > 0) {
    refresh_kernel<<<blocks_of(task.refreshed_count), kThreads, 0, device.stream()>>>(task);
    check_launch(op);
  }
  if (task.wanted > 0) {
    oldest_kernel<<<grid_size(parts.count), selection::kThreads, 0, device.stream()>>>(task, parts.slots);
    check_launch(op);
  }
  age_kernel<<<blocks_of(slots), kThreads, 0, device.stream()>>>(task.age, slots);
  check_launch(op);
  if (task.wanted > 0) {
    place_kernel<<<1, selection::kThreads, 0, device.stream()>>>(task);
    check_launch(op);
    launch_scatter(device, new_sources, tables, new_places, mask_of_new, nullptr, op);
  }
  HostTables::keep(tables, device, op);
}

}  // namespace
}  // namespace splade_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CUDA, m) {
  m.impl("gather_rows", TORCH_BOX(&splade_fast::cuda::gather_rows));
  m.impl("scatter_rows_", TORCH_BOX(&splade_fast::cuda::scatter_rows_));
  m.impl("update_cache_", TORCH_BOX(&splade_fast::cuda::update_cache_));
}
