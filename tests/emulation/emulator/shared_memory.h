// The dynamic shared memory of a block, whose every access is checked.
#pragma once

#include <cstring>
#include <vector>

#include "scheduler.h"

namespace emulation::hopper {

class SharedMemory {
 public:
  // Nothing but the alignment to 16 bytes is certain of where it starts. What was not written reads as NaN.
  static constexpr uint32_t kStart = 528;

  explicit SharedMemory(size_t bytes) : bytes_(bytes, 0xff) {}

  template <typename T>
  T load(uint32_t address) const {
    T element;
    std::memcpy(&element, &bytes_[offset(address, sizeof(T))], sizeof(T));
    return element;
  }

  void store(uint32_t address, const void* data, size_t size) {
    std::memcpy(&bytes_[offset(address, size)], data, size);
  }

 private:
  size_t offset(uint32_t address, size_t size) const {
    if (address < kStart || address + size > kStart + bytes_.size()) {
      fail("outside of dynamic shared memory");
    }
    return address - kStart;
  }

  std::vector<uint8_t> bytes_;
};

}  // namespace emulation::hopper
