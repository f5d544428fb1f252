// Shared by every op on CUDA, beside device.cuh: the dispatch over dtypes, the device and its stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "common/dispatch.h"
#include "cuda/device.cuh"

namespace splade_fast::cuda {

template <typename Body>
void dispatch_floating(ScalarType dtype, Body body) {
  dispatch_floating_as<__nv_bfloat16, __half>(dtype, body);
}

// Device and launches --------------------------------------------------------------------------------------------

inline void check_cuda(cudaError_t error, const char* op) {
  if (error != cudaSuccess) cudaGetLastError();  // clear the error, so that the next launch does not report it
  STD_TORCH_CHECK(error == cudaSuccess, "splade_fast::", op, ": ", cudaGetErrorString(error));
}

inline void check_launch(const char* op) { check_cuda(cudaGetLastError(), op); }

// Makes the device of a tensor the current one while it lives.
class OnDevice {
 public:
  OnDevice(const Tensor& tensor, const char* op) : device_(tensor.get_device_index()), guard_(device_) {
    // The CUDA runtime linked into this library keeps a current device of its own.
    int current = -1;
    check_cuda(cudaGetDevice(&current), op);
    if (current != device_) check_cuda(cudaSetDevice(device_), op);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    check_cuda(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device_), op);
    check_cuda(cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, device_), op);
    check_cuda(cudaDeviceGetAttribute(&minor_, cudaDevAttrComputeCapabilityMinor, device_), op);
  }

  cudaStream_t stream() const { return stream_; }
  int64_t multiprocessors() const { return multiprocessors_; }
  int compute_capability() const { return 10 * major_ + minor_; }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int multiprocessors_ = 0, major_ = 0, minor_ = 0;
};

inline unsigned grid_size(int64_t blocks) {
  STD_TORCH_CHECK(blocks > 0 && blocks <= INT32_MAX, "too many blocks for one launch: ", blocks);
  return static_cast<unsigned>(blocks);
}

// A grid has fewer rows than columns of blocks.
inline dim3 grid_size(int64_t columns, int64_t rows) {
  STD_TORCH_CHECK(rows > 0 && rows <= UINT16_MAX, "too many rows of blocks for one launch: ", rows);
  return dim3(grid_size(columns), static_cast<unsigned>(rows));
}

inline Tensor narrowed(Tensor tensor, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(tensor, dim, start, length);
}

}  // namespace splade_fast::cuda
