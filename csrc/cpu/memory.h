// Scratch memory, and huge pages for large outputs.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace splade_fast::cpu {

// Uninitialised memory, aligned to a vector, for one thread of one call.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(kAlignment, padded_bytes(count))), &std::free) {
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }

 private:
  static constexpr size_t kAlignment = 64;
  static size_t padded_bytes(int64_t count) { return (count * sizeof(T) / kAlignment + 1) * kAlignment; }
  std::unique_ptr<T, decltype(&std::free)> data_;
};

// Ask the system for pages of 2 MiB for a new tensor. The first write to new memory costs a page fault for each page,
// and with pages of 4 KiB the faults take much of the time that a large output takes to write.
inline void prefer_huge_pages(const torch::stable::Tensor& output) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(output.mutable_data_ptr());
  const uintptr_t end = begin + output.numel() * static_cast<uintptr_t>(output.element_size());
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1), last = end & ~(kHugePage - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace splade_fast::cpu
