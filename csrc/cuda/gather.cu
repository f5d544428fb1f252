// gather on CUDA: rows of several tables, read and written in one launch.
//
// A block takes a row of one table, or when writing a few rows, and copies it by the widest accesses that the row's
// size and the addresses allow. Tables lie in device memory or in pinned host memory, which the GPU reads in place.
//
// A write must be refused as a whole if any index is out of range, and of several writes to one row the last one has to
// win, both without the host looking. So every block reads all indices before it writes: a bad one stops every block by
// a device-side assertion, and a row with a later write is left out.
#include <torch/csrc/stable/library.h>

#include "../common/gather.h"
#include "common.cuh"

namespace splade_fast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxTables = 48;        // of a launch: the arguments of a kernel have 4 KiB
constexpr int kMaxRows = 32;          // that a block writes
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

// Whatever NDEBUG says, as PyTorch's own checks of indices: the next call that waits for the device raises.
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
    own[threadIdx.x] = indices[first + threadIdx.x];
    left_out[threadIdx.x] = mask != nullptr && !mask[first + threadIdx.x];
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

// Host functions -------------------------------------------------------------------------------------------------

int access_width(const Copy& copy) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(copy.source) | reinterpret_cast<uintptr_t>(copy.target) |
                        static_cast<uintptr_t>(copy.source_stride | copy.target_stride | copy.bytes);
  int width = kVectorBytes;
  while (all % static_cast<uintptr_t>(width) != 0) width /= 2;
  return width;
}

// The address of a table as the kernels see it: device memory as it is, pinned host memory where it is mapped.
uint8_t* device_address(const Tensor& table, const Tensor& indices, const char* op) {
  if (table.is_cuda()) {
    STD_TORCH_CHECK(table.device() == indices.device(), "tables must be on the device of indices or in pinned memory");
    return mutable_data<uint8_t>(table);
  }
  cudaPointerAttributes attributes{};
  check_cuda(cudaPointerGetAttributes(&attributes, table.const_data_ptr()), op);
  STD_TORCH_CHECK(table.numel() == 0 || attributes.type == cudaMemoryTypeHost,
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
  const Tensor places = torch::stable::contiguous(indices);
  Tensors sources, gathered;
  std::vector<Copy> copies;
  for (const Tensor& table : tables) {
    STD_TORCH_CHECK(table.is_cuda() || has_whole_rows(table), "tables in pinned memory must have contiguous rows");
    sources.push_back(has_whole_rows(table) ? table : torch::stable::contiguous(table));
    const Tensor& source = sources.back();
    std::vector<int64_t> shape(source.sizes().begin(), source.sizes().end());
    shape[0] = count;
    gathered.push_back(torch::stable::new_empty(indices, shape, source.scalar_type()));
    copies.push_back({device_address(source, indices, op), mutable_data<uint8_t>(gathered.back()),
                      row_stride_bytes(source), row_bytes(source), row_bytes(source), 0});
  }
  if (count == 0) return gathered;
  for_each_launch(copies, [&](const Copies& some) {
    gather_kernel<<<dim3(grid_size(count), some.count), kThreads, 0, device.stream()>>>(
        some, const_data<int64_t>(places), table_rows);
    check_launch(op);
  });
  return gathered;
}

void scatter_rows_(const Tensors& tables, const Tensor& indices, const Tensors& rows,
                   const std::optional<Tensor>& mask) {
  const char* op = "scatter_rows_";
  const int64_t table_rows = check_written(tables, indices, rows, mask), count = indices.size(0);
  STD_TORCH_CHECK(indices.is_cuda(), "indices must be on the GPU of the tables");
  const OnDevice device(indices, op);
  if (count == 0) return;
  const Tensor places = torch::stable::contiguous(indices);
  const std::optional<Tensor> whole_mask = contiguous_or_none(mask);
  const Tensors sources = contiguous_sources(rows, tables);
  std::vector<Copy> copies;
  for (size_t t = 0; t < tables.size(); ++t) {
    copies.push_back({const_data<uint8_t>(sources[t]), device_address(tables[t], indices, op), row_bytes(tables[t]),
                      row_stride_bytes(tables[t]), row_bytes(tables[t]), 0});
  }
  const int64_t rows_per_block = std::min<int64_t>(ceil_div(count, kBlocks), kMaxRows);
  const unsigned blocks = grid_size(ceil_div(count, rows_per_block));
  for_each_launch(copies, [&](const Copies& some) {
    scatter_kernel<<<dim3(blocks, some.count), kThreads, 0, device.stream()>>>(
        some, const_data<int64_t>(places), whole_mask ? const_data<bool>(*whole_mask) : nullptr, count, table_rows,
        static_cast<int>(rows_per_block));
    check_launch(op);
  });
}

}  // namespace
}  // namespace splade_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(splade_fast, CUDA, m) {
  m.impl("gather_rows", TORCH_BOX(&splade_fast::cuda::gather_rows));
  m.impl("scatter_rows_", TORCH_BOX(&splade_fast::cuda::scatter_rows_));
}
