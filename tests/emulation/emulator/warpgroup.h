// The asynchronous products of a warpgroup's 128 threads: wgmma.mma_async.m64n256k16 of bfloat16 or float16. From the
// PTX manual: "Register fragments", "Shared memory matrix layout", "Matrix descriptor".
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "shared_memory.h"

namespace emulation::hopper {

constexpr int kWarpgroupThreads = 128;

// d = a b^T, or d += a b^T. a and b are descriptors of operands in shared memory.
struct Product {
  float* d[kWarpgroupThreads];  // 128 accumulators of each thread
  uint64_t a, b;
  bool accumulates, is_bfloat16;
};

// Every call is for all threads of the warpgroup, which wait for each other in it.
class Warpgroup {
 public:
  explicit Warpgroup(const SharedMemory& memory) : memory_(&memory) {}

  void multiply(float* d, uint64_t a, uint64_t b, bool accumulates, bool is_bfloat16);
  void commit();
  // Until at most so many committed groups are not finished.
  void wait(int pending);

 private:
  using Group = std::vector<Product>;

  template <typename Work>
  void together(const std::string& call, Work work);
  void finish_groups(size_t pending);

  const SharedMemory* memory_;
  Product product_{};  // that the threads are putting together
  Group open_;
  std::deque<Group> committed_;
  std::string call_;
  int arrived_ = 0;
  unsigned generation_ = 0;
};

}  // namespace emulation::hopper
