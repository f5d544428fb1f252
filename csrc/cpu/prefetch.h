// Prefetching of memory.
#pragma once

#include <cstdint>

namespace splade_fast::cpu {

// Prefetch `bytes` bytes, with the arguments of __builtin_prefetch. GCC takes a function that only prefetches for one
// without effect, and drops calls that it has not inlined.
template <bool kToWrite = false, int kLocality = 3>
[[gnu::always_inline]] inline void prefetch_lines(const void* data, int64_t bytes) {
  constexpr int64_t kLine = 64;
  for (int64_t byte = 0; byte < bytes; byte += kLine) {
    __builtin_prefetch(static_cast<const char*>(data) + byte, kToWrite, kLocality);
  }
}

}  // namespace splade_fast::cpu
