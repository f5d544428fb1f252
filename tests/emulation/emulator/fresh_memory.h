// Memory that nobody has used, as a block gets it: its stacks and its shared memory.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

#include "race.h"

namespace emulation {

// Aligned to 64 bytes and not a byte longer than asked for, so that AddressSanitizer sees each access outside.
class FreshMemory {
 public:
  explicit FreshMemory(size_t bytes) {
    const race::Unseen unseen;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes) != 0) throw std::bad_alloc();
    memory_ = {static_cast<std::byte*>(memory), &forget};
  }

  std::byte* data() const { return memory_.get(); }

 private:
  // ThreadSanitizer forgets who used it.
  static void forget(std::byte* memory) {
    const race::Unseen unseen;
    std::free(memory);
  }

  std::unique_ptr<std::byte, void (*)(std::byte*)> memory_{nullptr, &forget};
};

}  // namespace emulation
