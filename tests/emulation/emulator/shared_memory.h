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

  uint16_t load(uint32_t address) const {
    uint16_t element;
    std::memcpy(&element, &bytes_[offset(address)], sizeof(element));
    return element;
  }

  void store(uint32_t address, uint16_t element) { std::memcpy(&bytes_[offset(address)], &element, sizeof(element)); }

 private:
  size_t offset(uint32_t address) const {
    if (address < kStart || address + sizeof(uint16_t) > kStart + bytes_.size()) {
      fail("outside of dynamic shared memory");
    }
    return address - kStart;
  }

  std::vector<uint8_t> bytes_;
};

}  // namespace emulation::hopper
