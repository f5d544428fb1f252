// gather on CUDA: rows of several tables, read and written in one launch.
//
// A block takes a row of one table, or when writing a few rows, and copies it by the widest accesses that the row's
// size and the addresses allow. Tables lie in device memory or in pinned host memory, which the GPU reads in place.
//
// An index out of range must refuse the whole write, and of several writes to one row the last one must win, both
// without the host. So every block reads all indices before it writes: a bad index stops every block by a device-side
// assertion, and a block skips a row that has a later write.
//
// The update of a cache is four launches: the refreshed rows; one block that ages every slot and finds the oldest; the
// order of those; the new rows, which go to the slots found.
#include <torch/csrc/stable/library.h>

#include "common/gather.h"
#include "cuda/common.cuh"
#include "cuda/host_tables.h"
#include "cuda/warp.cuh"

namespace splade_fast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxTables = 48;        // in a launch: the arguments of a kernel have 4 KiB
constexpr int kMaxRows = 32;          // written by a block
constexpr int64_t kBlocks = 1 << 10;  // more rows than this share a block

struct Copy {
  const uint8_t* source;
  uint8_t* target;
  int64_t source_stride, target_stride, bytes;  // of a row
  int width;                                    // bytes of an access
};

struct Copies {
  Copy table[kMaxTables];
  unsigned count;
};

template <typename Access>
__device__ void copy_by(const uint8_t* source, uint8_t* target, int64_t bytes) {
  const Access* from = reinterpret_cast<const Access*>(source);
  Access* to = reinterpret_cast<Access*>(target);
  const int64_t count = bytes / static_cast<int64_t>(sizeof(Access));
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = from[i];
}

__device__ void copy_row(const Copy& copy, int64_t from, int64_t to) {
  const uint8_t* source = copy.source + from * copy.source_stride;
  uint8_t* target = copy.target + to * copy.target_stride;
  if (copy.width == 16) {
    copy_by<uint4>(source, target, copy.bytes);
  } else if (copy.width == 8) {
    copy_by<uint2>(source, target, copy.bytes);
  } else if (copy.width == 4) {
    copy_by<uint32_t>(source, target, copy.bytes);
  } else if (copy.width == 2) {
    copy_by<uint16_t>(source, target, copy.bytes);
  } else {
    copy_by<uint8_t>(source, target, copy.bytes);
  }
}

__device__ inline bool in_range(int64_t index, int64_t table_rows) { return index >= 0 && index < table_rows; }

// Checks regardless of NDEBUG, as PyTorch checks indices: the next call that waits for the device raises.
__device__ inline void refuse() {
  __assert_fail("indices must be between 0 and the last row of the tables", __FILE__, __LINE__, "splade_fast gather");
}

// A block per row and table.
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ Copies copies, const int64_t* indices, int64_t table_rows) {
  const int64_t row = blockIdx.x, index = indices[row];
  if (!in_range(index, table_rows)) return refuse();
  copy_row(copies.table[blockIdx.y], index, row);
}

// A block has the writes [first, first + rows) to one table.
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const __grid_constant__ Copies copies, const int64_t* indices, const bool* mask, int64_t count,
                   int64_t table_rows, int rows_per_block) {
  __shared__ int64_t own[kMaxRows];
  __shared__ int left_out[kMaxRows];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows_per_block;
  const int rows = static_cast<int>(min(static_cast<int64_t>(rows_per_block), count - first));
  if (threadIdx.x < rows) {
    const bool written = mask == nullptr || mask[first + threadIdx.x];
    own[threadIdx.x] =
        written ? indices[first + threadIdx.x] : -1;  // the index under a false mask may be uninitialised
    left_out[threadIdx.x] = !written;
  }
  __syncthreads();
  bool all_in_range = true;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    if (mask != nullptr && !mask[i]) continue;
    const int64_t index = indices[i];
    all_in_range = all_in_range && in_range(index, table_rows);
    for (int row = 0; row < rows; ++row) {
      if (index == own[row] && i > first + row) atomicOr(&left_out[row], 1);
    }
  }
  if (!__syncthreads_and(all_in_range)) return refuse();
  for (int row = 0; row < rows; ++row) {
    if (left_out[row] == 0) copy_row(copies.table[blockIdx.y], first + row, own[row]);
  }
}

// Ages -----------------------------------------------------------------------------------------------------------

constexpr int kAgeThreads = 1024, kAgeWarps = kAgeThreads / kWarp;
constexpr int kDigitBits = 8, kBins = 1 << kDigitBits;

struct AgeTask {
  int32_t* age;
  bool* valid;
  int64_t slots;
  const int64_t* refreshed;
  const bool* refreshed_mask;
  int64_t refreshed_count;
  bool use_lru;  // refreshed slots become the youngest
  const bool* new_mask;
  int64_t new_count;
  int64_t wanted;         // number of oldest slots to find, at most the number of slots
  int64_t* found;         // (wanted,) their slots, ascending
  int32_t* found_age;     // (wanted,)
  int64_t* item_of_rank;  // (wanted,) which new item takes the slot of a rank, -1: none
  int64_t* places;        // (new_count,) the slots of the new items
};

struct AgeShared {
  unsigned warp[kAgeWarps], total;
  int32_t largest[kAgeWarps], smallest[kAgeWarps];
  unsigned long long histogram[kBins];
  int digit;
  int64_t remaining;
};

// Number of threads before this one in the block with a true argument; total: number in the whole block.
__device__ unsigned rank_in_block(AgeShared& shared, bool is_counted, unsigned& total) {
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

// The m-th new item that is not masked gets rank m.
__device__ void rank_new_items(AgeShared& shared, const AgeTask& task) {
  for (int64_t rank = threadIdx.x; rank < task.wanted; rank += kAgeThreads) task.item_of_rank[rank] = -1;
  __syncthreads();
  int64_t before = 0;
  for (int64_t tile = 0; tile < task.new_count; tile += kAgeThreads) {
    const int64_t item = tile + threadIdx.x;
    const bool added = item < task.new_count && (task.new_mask == nullptr || task.new_mask[item]);
    unsigned total = 0;
    const int64_t rank = before + rank_in_block(shared, added, total);
    if (added && rank < task.wanted) task.item_of_rank[rank] = item;
    if (added && rank >= task.wanted) task.places[item] = -1;  // no table has this slot
    before += total;
  }
}

// The largest and the smallest age.
__device__ void age_range(AgeShared& shared, const AgeTask& task, int32_t& largest, int32_t& smallest) {
  largest = INT32_MIN;
  smallest = INT32_MAX;
  for (int64_t slot = threadIdx.x; slot < task.slots; slot += kAgeThreads) {
    largest = max(largest, task.age[slot]);
    smallest = min(smallest, task.age[slot]);
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
    smallest = min(smallest, __shfl_xor_sync(kAllLanes, smallest, step));
  }
  if (threadIdx.x % kWarp == 0) {
    shared.largest[threadIdx.x / kWarp] = largest;
    shared.smallest[threadIdx.x / kWarp] = smallest;
  }
  __syncthreads();
  for (int warp = 0; warp < kAgeWarps; ++warp) {
    largest = max(largest, shared.largest[warp]);
    smallest = min(smallest, shared.smallest[warp]);
  }
}

struct AgeCut {
  unsigned youth;   // difference of age between the oldest slot and the wanted-th oldest
  int64_t of_them;  // number of wanted slots with that difference
};

// Finds the difference digit by digit, from the highest digit that differs.
__device__ AgeCut select_oldest(AgeShared& shared, const AgeTask& task, int32_t largest, int32_t smallest) {
  const int lane = threadIdx.x % kWarp;
  const unsigned range = static_cast<unsigned>(largest) - static_cast<unsigned>(smallest);
  const int digits = (kWarp - __clz(static_cast<int>(range)) + kDigitBits - 1) / kDigitBits;
  unsigned prefix = 0;
  int64_t remaining = task.wanted;
  for (int shift = (digits - 1) * kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int bin = threadIdx.x; bin < kBins; bin += kAgeThreads) shared.histogram[bin] = 0;
    __syncthreads();
    const unsigned known = prefix >> shift >> kDigitBits;  // in two steps: a shift by all bits is undefined
    for (int64_t tile = 0; tile < task.slots; tile += kAgeThreads) {
      const int64_t slot = tile + threadIdx.x;
      unsigned youth = 0;
      if (slot < task.slots) youth = static_cast<unsigned>(largest) - static_cast<unsigned>(task.age[slot]);
      const bool is_counted = slot < task.slots && youth >> shift >> kDigitBits == known;
      const int digit = is_counted ? static_cast<int>(youth >> shift) & (kBins - 1) : kBins;
      // Most neighbouring slots have the same age: one atomic serves all lanes that agree.
      const unsigned peers = __match_any_sync(kAllLanes, digit);
      if (is_counted && lane == __ffs(static_cast<int>(peers)) - 1) {
        atomicAdd(&shared.histogram[digit], static_cast<unsigned long long>(__popc(peers)));
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = 0;
      const auto of_digit = [&] { return static_cast<int64_t>(shared.histogram[digit]); };
      for (; of_digit() < remaining; ++digit) remaining -= of_digit();
      shared.digit = digit;
      shared.remaining = remaining;
    }
    __syncthreads();
    prefix |= static_cast<unsigned>(shared.digit) << shift;
    remaining = shared.remaining;
  }
  return {prefix, remaining};
}

// One block, so its threads see what it wrote before.
__global__ void __launch_bounds__(kAgeThreads, 1) age_kernel(const AgeTask task) {
  __shared__ AgeShared shared;
  bool all_in_range = true;
  for (int64_t i = threadIdx.x; i < task.refreshed_count; i += kAgeThreads) {
    if (task.refreshed_mask != nullptr && !task.refreshed_mask[i]) continue;
    all_in_range = all_in_range && in_range(task.refreshed[i], task.slots);
  }
  if (!__syncthreads_and(all_in_range)) return refuse();
  for (int64_t i = threadIdx.x; task.use_lru && i < task.refreshed_count; i += kAgeThreads) {
    if (task.refreshed_mask == nullptr || task.refreshed_mask[i]) task.age[task.refreshed[i]] = -1;
  }
  rank_new_items(shared, task);
  __syncthreads();
  int32_t largest = 0, smallest = 0;
  AgeCut cut{0, 0};
  if (task.wanted > 0) {
    age_range(shared, task, largest, smallest);
    cut = select_oldest(shared, task, largest, smallest);
  }
  int64_t certain = 0, ties = 0;
  for (int64_t tile = 0; tile < task.slots; tile += kAgeThreads) {
    const int64_t slot = tile + threadIdx.x;
    const int32_t age = slot < task.slots ? task.age[slot] : 0;
    if (slot < task.slots) task.age[slot] = static_cast<int32_t>(static_cast<unsigned>(age) + 1);
    if (certain + ties >= task.wanted) continue;  // the same for all threads
    const unsigned youth = static_cast<unsigned>(largest) - static_cast<unsigned>(age);
    unsigned new_certain = 0, new_ties = 0;
    const bool is_certain = slot < task.slots && youth < cut.youth, is_tie = slot < task.slots && youth == cut.youth;
    const int64_t certain_before = certain + rank_in_block(shared, is_certain, new_certain);
    const int64_t ties_before = ties + rank_in_block(shared, is_tie, new_ties);
    if (is_certain || (is_tie && ties_before < cut.of_them)) {
      const int64_t place = certain_before + min(ties_before, cut.of_them);
      task.found[place] = slot;
      task.found_age[place] = age;
    }
    certain += new_certain;
    ties = min(ties + new_ties, cut.of_them);
  }
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

// launch(copies) for every kMaxTables tables that have bytes to copy.
template <typename Launch>
void for_each_launch(const std::vector<Copy>& all, Launch launch) {
  Copies copies{};
  for (const Copy& copy : all) {
    if (copy.bytes == 0) continue;
    copies.table[copies.count] = copy;
    copies.table[copies.count].width = access_width(copy);
    if (++copies.count == kMaxTables) {
      launch(copies);
      copies.count = 0;
    }
  }
  if (copies.count > 0) launch(copies);
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
                      row_stride_bytes(source), row_bytes(source), row_bytes(source), 0});
  }
  if (count == 0) return gathered;
  for_each_launch(copies, [&](const Copies& some) {
    gather_kernel<<<grid_size(count, some.count), kThreads, 0, device.stream()>>>(some, const_data<int64_t>(places),
                                                                                  table_rows);
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
  std::vector<Copy> copies;
  for (size_t t = 0; t < sources.size(); ++t) {
    copies.push_back({const_data<uint8_t>(sources[t]), device_address(tables[t], places, op), row_bytes(tables[t]),
                      row_stride_bytes(tables[t]), row_bytes(tables[t]), 0});
  }
  const int64_t rows_per_block = std::min<int64_t>(ceil_div(count, kBlocks), kMaxRows);
  const int64_t blocks = ceil_div(count, rows_per_block);
  for_each_launch(copies, [&](const Copies& some) {
    scatter_kernel<<<grid_size(blocks, some.count), kThreads, 0, device.stream()>>>(
        some, const_data<int64_t>(places), mask ? const_data<bool>(*mask) : nullptr, count, table_rows,
        static_cast<int>(rows_per_block));
    check_launch(op);
  });
}

void scatter_rows_(const Tensors& tables, const Tensor& indices, const Tensors& rows,
                   const std::optional<Tensor>& mask) {
  const char* op = "scatter_rows_";
  const int64_t table_rows = check_scatter(tables, indices, rows, mask);
  STD_TORCH_CHECK(indices.is_cuda(), "indices must be on the GPU of the tables");
  const OnDevice device(indices, op);
  launch_scatter(device, contiguous_sources(rows, tables), tables, as_contiguous(indices), contiguous_or_none(mask),
                 table_rows, op);
  HostTables::keep(tables, device, op);
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
  task.use_lru = use_lru;
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
  age_kernel<<<1, kAgeThreads, 0, device.stream()>>>(task);
  check_launch(op);
  if (task.wanted > 0) {
    rank_kernel<<<grid_size(ceil_div(task.wanted, kThreads)), kThreads, 0, device.stream()>>>(task);
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
