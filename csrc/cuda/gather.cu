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
// part of the cache, and one block the oldest of those; then every slot ages, a launch orders the oldest, and the new
// rows go there.
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
                   const unsigned* last) {
  const Copy& copy = copies.table[blockIdx.y];
  const Lane lane(copy);
  if (lane.row >= count || (mask != nullptr && !mask[lane.row])) return;
  const int64_t index = indices[lane.row];
  if (last[index] == lane.row + 1) copy_row(copy, lane.row, index, lane.number);
}

// Ages -----------------------------------------------------------------------------------------------------------

constexpr int kRankThreads = 1024, kRankWarps = kRankThreads / kWarp;

struct AgeTask {
  int32_t* age;
  bool* valid;
  int64_t slots;
  const int64_t* refreshed;
  const bool* refreshed_mask;
  int64_t refreshed_count;
  const bool* new_mask;
  int64_t new_count;
  int64_t wanted;         // number of oldest slots to find, at most the number of slots
  int64_t* found;         // (wanted,) their slots, ascending
  int32_t* found_age;     // (wanted,)
  int64_t* item_of_rank;  // (wanted,) which new item takes the slot of a rank, -1: none
  int64_t* places;        // (new_count,) the slots of the new items
};

struct RankShared {
  unsigned warp[kRankWarps], total;
};

// Number of threads before this one in the block with a true argument; total: number in the whole block.
__device__ unsigned rank_in_block(RankShared& shared, bool is_counted, unsigned& total) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const unsigned ballot = __ballot_sync(kAllLanes, is_counted);
  __syncthreads();  // all threads have read the results of the last call
  if (lane == 0) shared.warp[warp] = __popc(ballot);
  __syncthreads();
  if (warp == 0) {
    const unsigned own = shared.warp[lane];
    unsigned through = own;
    for (int step = 1; step < kWarp; step *= 2) {
      const unsigned other = __shfl_up_sync(kAllLanes, through, step);
      if (lane >= step) through += other;
    }
    shared.warp[lane] = through - own;
    if (lane == kWarp - 1) shared.total = through;
  }
  __syncthreads();
  total = shared.total;
  return shared.warp[warp] + __popc(ballot & ((1u << lane) - 1));
}

// The m-th new item that is not masked gets rank m. One block.
__global__ void __launch_bounds__(kRankThreads) rank_items_kernel(const AgeTask task) {
  __shared__ RankShared shared;
  for (int64_t rank = threadIdx.x; rank < task.wanted; rank += kRankThreads) task.item_of_rank[rank] = -1;
  __syncthreads();
  int64_t before = 0;
  for (int64_t tile = 0; tile < task.new_count; tile += kRankThreads) {
    const int64_t item = tile + threadIdx.x;
    const bool added = item < task.new_count && (task.new_mask == nullptr || task.new_mask[item]);
    unsigned total = 0;
    const int64_t rank = before + rank_in_block(shared, added, total);
    if (added && rank < task.wanted) task.item_of_rank[rank] = item;
    if (added && rank >= task.wanted) task.places[item] = -1;  // no table has this slot
    before += total;
  }
}

// Makes the refreshed slots the youngest.
__global__ void __launch_bounds__(kThreads) refresh_kernel(const AgeTask task) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= task.refreshed_count || (task.refreshed_mask != nullptr && !task.refreshed_mask[i])) return;
  atomicExch(task.age + task.refreshed[i], -1);
}

// Slots and their ages.
struct Slots {
  int32_t* age;
  int64_t* number;  // -1: none; null: slot i has the number i
  int64_t count;
};

// A block selects the `wanted` oldest of its part of the slots, of equal ages the first, in order.
__global__ void __launch_bounds__(selection::kThreads)
    oldest_kernel(const Slots slots, int64_t per_block, int wanted, const Slots oldest) {
  using Ages = double;  // keys of 64 bits, since none of 32 bits is left for a missing slot
  using Key = OrderedKey<Ages>;
  __shared__ selection::Shared<Ages> shared;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * per_block, row = static_cast<int64_t>(blockIdx.x) * wanted;
  const int count = static_cast<int>(min(per_block, slots.count - first));
  const auto key = [&](int i) {
    const bool is_missing = slots.number != nullptr && slots.number[first + i] < 0;
    const Key age = (static_cast<uint32_t>(slots.age[first + i]) ^ 0x80000000u) + Key(1);
    return is_missing ? Key(0) : age;
  };
  const int found = selection::select_largest<Ages>(
      shared, count, wanted, Key(0), key, [](Key) { return Key(0); },
      [&](int i, int place) {
        oldest.age[row + place] = slots.age[first + i];
        oldest.number[row + place] = slots.number != nullptr ? slots.number[first + i] : first + i;
      });
  for (int place = found + static_cast<int>(threadIdx.x); place < wanted; place += selection::kThreads) {
    oldest.age[row + place] = 0;
    oldest.number[row + place] = -1;
  }
}

__global__ void __launch_bounds__(kThreads) age_kernel(int32_t* age, int64_t slots) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (slot < slots) age[slot] = static_cast<int32_t>(static_cast<uint32_t>(age[slot]) + 1);
}

// A thread for each found slot: its rank is the number of older slots, and of slots of the same age in front of it.
__global__ void __launch_bounds__(kThreads) rank_kernel(const AgeTask task) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= task.wanted) return;
  const int32_t age = task.found_age[i];
  int64_t rank = 0;
  for (int64_t other = 0; other < task.wanted; ++other) {
    rank += task.found_age[other] > age || (task.found_age[other] == age && other < i);
  }
  const int64_t item = task.item_of_rank[rank], slot = task.found[i];
  if (item < 0) return;
  task.places[item] = slot;
  task.age[slot] = 0;
  task.valid[slot] = true;
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

// Rows of sources to the first tables, one of each source.
void launch_scatter(const OnDevice& device, const Tensors& sources, const Tensors& tables, const Tensor& places,
                    const std::optional<Tensor>& mask, int64_t table_rows, const char* op) {
  const int64_t count = places.size(0);
  if (count == 0) return;
  STD_TORCH_CHECK(count < UINT32_MAX, "indices must be fewer than 2^32 - 1, got ", count);
  std::vector<Copy> copies;
  for (size_t t = 0; t < sources.size(); ++t) {
    copies.push_back({const_data<uint8_t>(sources[t]), device_address(tables[t], places, op), row_bytes(tables[t]),
                      row_stride_bytes(tables[t]), row_bytes(tables[t]), 0, 0});
  }
  const int64_t* indices = const_data<int64_t>(places);
  const bool* flags = mask ? const_data<bool>(*mask) : nullptr;
  const Tensor last_writes = new_zeros_tensor(places, std::vector<int64_t>{table_rows}, ScalarType::Int);
  unsigned* last = reinterpret_cast<unsigned*>(mutable_data<int32_t>(last_writes));
  last_write_kernel<<<grid_size(ceil_div(count, kThreads)), kThreads, 0, device.stream()>>>(indices, flags, count,
                                                                                            table_rows, last);
  check_launch(op);
  for_each_launch(copies, count, [&](const Copies& some, dim3 grid) {
    scatter_kernel<<<grid, kThreads, 0, device.stream()>>>(some, indices, flags, count, last);
    check_launch(op);
  });
}

void scatter_rows_(const Tensors& tables, const Tensor& indices, const Tensors& rows,
                   const std::optional<Tensor>& mask) {
  const char* op = "scatter_rows_";
  const int64_t table_rows = check_scatter(tables, indices, rows, mask);
  STD_TORCH_CHECK(indices.is_cuda(), "indices must be on the GPU of the tables");
  const OnDevice device(indices, op);
  if (tables.empty()) return;
  launch_scatter(device, contiguous_sources(rows, tables), tables, as_contiguous(indices), contiguous_or_none(mask),
                 table_rows, op);
  HostTables::keep(tables, device, op);
}

// Finds the wanted oldest slots, ascending, and their ages.
void launch_oldest(const OnDevice& device, const AgeTask& task, const Tensor& like, const char* op) {
  const auto launch = [&](const Slots& slots, int64_t blocks, int64_t per_block, const Slots& oldest) {
    oldest_kernel<<<grid_size(blocks), selection::kThreads, 0, device.stream()>>>(
        slots, per_block, static_cast<int>(task.wanted), oldest);
    check_launch(op);
  };
  const Slots all{task.age, nullptr, task.slots}, found{task.found_age, task.found, task.wanted};
  // Parts that are much larger than what is kept of them.
  const int64_t least = std::max(4 * task.wanted, kMinPart);
  const int64_t parts = std::min(task.slots / least, device.multiprocessors());
  if (parts < 2) return launch(all, 1, task.slots, found);
  const int64_t per_part = ceil_div(task.slots, parts), blocks = ceil_div(task.slots, per_part);
  const std::vector<int64_t> shape{blocks * task.wanted};
  const Tensor age = new_tensor(like, shape), number = new_tensor(like, shape, ScalarType::Long);
  const Slots of_parts{mutable_data<int32_t>(age), mutable_data<int64_t>(number), shape[0]};
  launch(all, blocks, per_part, of_parts);
  launch(of_parts, 1, of_parts.count, found);
}

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
  STD_TORCH_CHECK(slots < INT32_MAX - selection::kTile<double>, "age must have fewer than 2^31 slots on a GPU, got ",
                  slots);
  const Tensors written = update.written();
  for (const Tensor& table : tables) device_address(table, age, op);  // raise before anything is written
  const Tensors refreshed_sources = contiguous_sources(refreshed_rows, written);
  const Tensors new_sources = contiguous_sources(new_rows, written);
  const std::optional<Tensor> places = contiguous_or_none(refreshed_slots);
  const std::optional<Tensor> mask_of_refreshed = contiguous_or_none(refreshed_mask);
  const std::optional<Tensor> mask_of_new = contiguous_or_none(new_mask);
  if (places) launch_scatter(device, refreshed_sources, tables, *places, mask_of_refreshed, slots, op);

  AgeTask task{};
  task.wanted = std::min(new_count, slots);
  const Tensor found = new_tensor(age, std::vector<int64_t>{2, task.wanted}, ScalarType::Long);
  const Tensor found_age = new_tensor(age, std::vector<int64_t>{task.wanted});
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
  task.found = mutable_data<int64_t>(found);
  task.item_of_rank = task.found + task.wanted;
  task.found_age = mutable_data<int32_t>(found_age);
  task.places = mutable_data<int64_t>(new_places);
  const auto blocks_of = [](int64_t count) { return grid_size(ceil_div(count, kThreads)); };
  if (use_lru && task.refreshed_count > 0) {
    refresh_kernel<<<blocks_of(task.refreshed_count), kThreads, 0, device.stream()>>>(task);
    check_launch(op);
  }
  if (task.wanted > 0) {
    rank_items_kernel<<<1, kRankThreads, 0, device.stream()>>>(task);
    check_launch(op);
    launch_oldest(device, task, age, op);
  }
  age_kernel<<<blocks_of(slots), kThreads, 0, device.stream()>>>(task.age, slots);
  check_launch(op);
  if (task.wanted > 0) {
    rank_kernel<<<blocks_of(task.wanted), kThreads, 0, device.stream()>>>(task);
    check_launch(op);
    launch_scatter(device, new_sources, tables, new_places, mask_of_new, slots, op);
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
