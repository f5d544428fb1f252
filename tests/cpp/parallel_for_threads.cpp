// torch_parallel_for with std::thread, for ThreadSanitizer. The sanitizer cannot see how the OpenMP threads of torch
// wait for each other, and would report every access that they synchronise.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr uint32_t kThreads = 4;
thread_local uint32_t thread_index = 0;
thread_local bool is_worker = false;

// A call of torch_parallel_for, which keeps the first exception of its threads.
class Range {
 public:
  Range(int64_t begin, int64_t end, ParallelFunc function, void* context)
      : begin_(begin), end_(end), function_(function), context_(context) {}

  void run(uint32_t index, int64_t first, int64_t count) {
    thread_index = index;
    is_worker = true;
    try {
      function_(first, std::min(end_, first + count), context_);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
    is_worker = false;
    thread_index = 0;
  }

  bool run_all(int64_t grain) {
    const int64_t size = end_ - begin_;
    const int64_t parts = std::clamp<int64_t>(size / std::max<int64_t>(grain, 1), 1, kThreads);
    const int64_t count = (size + parts - 1) / parts;
    std::vector<std::thread> threads;
    for (int64_t part = 1; part * count < size; ++part) {
      threads.emplace_back([this, part, count] { run(static_cast<uint32_t>(part), begin_ + part * count, count); });
    }
    run(0, begin_, count);
    for (std::thread& thread : threads) thread.join();
    return !error_;
  }

 private:
  int64_t begin_, end_;
  ParallelFunc function_;
  void* context_;
  std::mutex mutex_;
  std::exception_ptr error_;
};

}  // namespace

extern "C" {

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc func, void* ctx) {
  if (begin >= end) return AOTI_TORCH_SUCCESS;
  if (is_worker) {  // nested calls start no threads, as in torch
    func(begin, end, ctx);
    return AOTI_TORCH_SUCCESS;
  }
  return Range(begin, end, func, ctx).run_all(grain_size) ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

AOTITorchError torch_get_thread_idx(uint32_t* out_thread_idx) {
  *out_thread_idx = thread_index;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_get_num_threads(uint32_t* out_num_threads) {
  *out_num_threads = kThreads;
  return AOTI_TORCH_SUCCESS;
}
}
