// Scratch memory and hints about large outputs.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace splade_fast::cpu {

// Aligned, uninitialised scratch for one thread of one call.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(kAlignment, round_up(count * sizeof(T)))), &std::free) {
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }

 private:
  static constexpr size_t kAlignment = 64;
  static size_t round_up(size_t bytes) { return (bytes / kAlignment + 1) * kAlignment; }
  std::unique_ptr<T, decltype(&std::free)> data_;
};

// A large fresh output costs a page fault every 4 KiB when it is first written. With 2 MiB pages, where the system
// grants them, that is a small part of it.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace splade_fast::cpu
