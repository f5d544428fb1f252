// Tables in pinned host memory that a kernel reads or writes in place.
//
// An op returns when its kernel is queued, and the caller may drop the table then. torch keeps freed device memory for
// the same stream, where later work waits for the kernel. But it hands out freed pinned memory at once, also to the
// host, which would write there while the kernel still reads. So keep() takes a reference to each such table and
// records an event behind the kernel. Nothing waits for the event: each later call asks for all events of earlier ones,
// and releases the tables of those that have passed. The tables of the last calls therefore stay until another call.
//
// While a graph is captured, no kernel runs and no event can be recorded for the host to ask for. The graph may run at
// any time, so the memory of a captured kernel is the caller's to keep, as for every captured kernel.
#pragma once

#include <algorithm>
#include <mutex>
#include <vector>

#include "cuda/common.cuh"

namespace splade_fast::cuda {

inline bool is_in_host_memory(const Tensor& table) { return !table.is_cuda(); }

class HostTables {
 public:
  // Keeps those of the tables that are in host memory until the work on the stream so far is done.
  static void keep(const std::vector<Tensor>& tables, const OnDevice& device, const char* op) {
    std::vector<Tensor> kept;
    std::copy_if(tables.begin(), tables.end(), std::back_inserter(kept), is_in_host_memory);
    if (kept.empty()) return;
    cudaStreamCaptureStatus capture{};
    check_cuda(cudaStreamIsCapturing(device.stream(), &capture), op);
    if (capture != cudaStreamCaptureStatusNone) return;
    cudaEvent_t event = nullptr;
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), op);
    const cudaError_t error = cudaEventRecord(event, device.stream());
    if (error != cudaSuccess) cudaEventDestroy(event);
    check_cuda(error, op);
    // Never destroyed: at the end of the process torch's allocator may be gone before a static object.
    static auto* const uses = new HostTables;
    uses->replace_finished({event, std::move(kept)});
  }

 private:
  struct Use {
    cudaEvent_t event;
    std::vector<Tensor> tables;
  };

  void replace_finished(Use added) {
    std::vector<Use> finished;  // released after the lock: the last reference of a tensor may need Python's lock
    const std::lock_guard<std::mutex> lock(mutex_);
    // Another thread may capture a graph, during which CUDA permits queries in this mode only.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    const auto is_running = [](const Use& use) { return cudaEventQuery(use.event) == cudaErrorNotReady; };
    const auto first = std::stable_partition(uses_.begin(), uses_.end(), is_running);
    std::move(first, uses_.end(), std::back_inserter(finished));
    uses_.erase(first, uses_.end());
    uses_.push_back(std::move(added));
    for (const Use& use : finished) cudaEventDestroy(use.event);
    cudaGetLastError();  // of the queries
    cudaThreadExchangeStreamCaptureMode(&mode);
  }

  std::mutex mutex_;
  std::vector<Use> uses_;
};

}  // namespace splade_fast::cuda
