// What csrc/cuda uses of cuda_runtime.h: one GPU, number -1 as torch counts the CPU, with the host's memory, whose work
// is done before a call returns.
#pragma once

#include <cstddef>

#include "device_functions.h"
#include "hopper_machine.h"
#include "launch.h"
#include "pinned_memory.h"

using cudaStream_t = void*;

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorNotSupported,
  cudaErrorNotReady
};
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulated CUDA runtime"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// Devices and memory ---------------------------------------------------------------------------------------------

inline cudaError_t cudaGetDevice(int* device) {
  *device = -1;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int) { return cudaErrorInvalidValue; }

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMultiProcessorCount) *value = emulation::settings().multiprocessors;
  if (attribute == cudaDevAttrComputeCapabilityMajor) *value = 9;
  if (attribute == cudaDevAttrComputeCapabilityMinor) *value = 0;
  return cudaSuccess;
}

enum cudaMemoryType { cudaMemoryTypeHost = 1 };
struct cudaPointerAttributes {
  cudaMemoryType type;
  void* devicePointer;
};

inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  *attributes = {cudaMemoryTypeHost, const_cast<void*>(pointer)};
  return cudaSuccess;
}

// Events: work is done at once, but for a test that lets it seem to run.
using cudaEvent_t = void*;
enum { cudaEventDisableTiming = 2 };
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t) {
  return emulation::is_work_running() ? cudaErrorNotReady : cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

// Where an index out of range ends on the device.
[[noreturn]] inline void device_assert(const char* message, const char*, int, const char*) { emulation::fail(message); }

// Launches of clusters -------------------------------------------------------------------------------------------

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= emulation::hopper::kMaxSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  *clusters = emulation::settings().clusters;
  return cudaSuccess;
}

// Clusters run one after the other, each with its machine and its dynamic shared memory.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const auto& cluster = config->attrs[0].val.clusterDim;
  if (config->numAttrs != 1 || cluster.x > emulation::hopper::kMaxBlocks || cluster.y != 1 || cluster.z != 1 ||
      config->dynamicSmemBytes > emulation::hopper::kMaxSharedBytes) {
    return cudaErrorInvalidConfiguration;
  }
  const int blocks = static_cast<int>(cluster.x);
  const emulation::hopper::Machine machine(blocks, config->dynamicSmemBytes);
  emulation::Bound<Parameters...>{kernel, config->gridDim, config->blockDim,
                                  blocks}(std::forward<Arguments>(arguments)...);
  return cudaSuccess;
}

// The driver -----------------------------------------------------------------------------------------------------

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
enum { cudaEnableDefault };

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* result) {
  const bool found = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = found ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
