// Memory between the pieces of a workspace, which AddressSanitizer lets nobody touch.
#pragma once

#include <cstdint>

#if defined(EMULATION_MEMORY)
#include <sanitizer/asan_interface.h>
#endif

namespace emulation {

// Returns the bytes from a piece to the next one.
inline int64_t bytes_with_gap(uintptr_t piece, int64_t bytes, int64_t alignment, bool has_memory) {
  const int64_t all = (bytes / alignment + 1) * alignment;
#if defined(EMULATION_MEMORY)
  if (has_memory) {
    __asan_poison_memory_region(reinterpret_cast<void*>(piece + static_cast<uintptr_t>(bytes)),
                                static_cast<size_t>(all - bytes));
  }
#else
  static_cast<void>(piece);
  static_cast<void>(has_memory);
#endif
  return all;
}

}  // namespace emulation
