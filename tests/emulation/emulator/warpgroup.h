// The asynchronous products of a warpgroup's 128 threads: wgmma.mma_async.m64n256 with operands in shared memory, of
// any type of element. From the PTX manual: "Register fragments", "Shared memory matrix layout", "Matrix descriptor".
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "shared_memory.h"

namespace emulation::hopper {

constexpr int kWarpgroupThreads = 128;

// d = a b^T, or d += a b^T. a and b are descriptors of operands in shared memory.
struct Product {
  void* d[kWarpgroupThreads];  // 128 accumulators of each thread, of the type that the elements are added up in
  uint64_t a, b;
  bool accumulates;
  void (*run)(const Product&, const SharedMemory&);
  race::Order issued;
};

// How the elements of an operand are read, and what they are added up in.
template <typename BitsOf, typename SumOf>
struct Element {
  using Bits = BitsOf;
  using Sum = SumOf;
};

struct Bfloat16 : Element<uint16_t, float> {
  static float value(uint16_t bits);
};

struct Float16 : Element<uint16_t, float> {
  static float value(uint16_t bits);
};

struct Tfloat32 : Element<uint32_t, float> {
  static float value(uint32_t bits);
};

struct Int8 : Element<int8_t, int32_t> {
  static int32_t value(int8_t bits) { return bits; }
};

// Every call is for all threads of the warpgroup, which wait for each other in it.
class Warpgroup {
 public:
  explicit Warpgroup(const SharedMemory& memory) : memory_(&memory) {}

  template <typename Type>
  void multiply(typename Type::Sum* d, uint64_t a, uint64_t b, bool accumulates);
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
  race::Agent tensor_cores_{"tensor cores"};
  race::Order finished_;  // all products so far
};

}  // namespace emulation::hopper
