// The dynamic shared memory of a block, whose every access is checked.
#pragma once

#include <cstring>

#include "fresh_memory.h"
#include "scheduler.h"

namespace emulation::hopper {

class SharedMemory {
 public:
  // Nothing but the alignment to 16 bytes is certain of where it starts. What was not written reads as NaN.
  static constexpr uint32_t kStart = 528;

  explicit SharedMemory(size_t bytes) : bytes_(bytes), memory_(bytes) { std::memset(memory_.data(), 0xff, bytes); }

  void record_read(uint32_t address, size_t size) const { race::read(place(address, size), size); }

  template <typename T>
  T load(uint32_t address) const {
    T element;
    std::memcpy(&element, place(address, sizeof(T)), sizeof(T));
    return element;
  }

  void store(uint32_t address, const void* data, size_t size) const {
    race::written(place(address, size), size);
    std::memcpy(place(address, size), data, size);
  }

 private:
  std::byte* place(uint32_t address, size_t size) const {
    if (address < kStart || address + size > kStart + bytes_) fail("outside of dynamic shared memory");
    return memory_.data() + (address - kStart);
  }

  size_t bytes_;
  FreshMemory memory_;
};

}  // namespace emulation::hopper
