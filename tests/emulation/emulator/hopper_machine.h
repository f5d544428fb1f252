// What a cluster of sm_90a has beside its threads: dynamic shared memory, mbarriers in it, the engine that copies
// tensors, and the tensor cores. Addresses are of the shared window.
#pragma once

#include <map>
#include <vector>

#include "cuda.h"
#include "race.h"
#include "scheduler.h"
#include "warpgroup.h"

namespace emulation::hopper {

constexpr int kMaxBlocks = 2;  // of a cluster, here
constexpr int kMaxSharedBytes = 227 << 10;

// Counts arrivals and bytes that are still to come; its phase ends when there are none of either.
struct MemoryBarrier {
  int arrivals = 0;  // of every phase
  int pending = 0;   // of this one
  int64_t bytes = 0;
  unsigned phase = 0;
  race::Order order[2];  // of the arrivals of this phase and the next

  void end_phase_if_complete();
};

class Machine : public Engine {
 public:
  Machine(int blocks, size_t shared_bytes);
  ~Machine() override;
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  // The one whose cluster is running.
  static Machine& current();

  void begin() override;
  bool step() override;
  void end() override;

  void init_barrier(uint32_t address, int arrivals);
  void arrive(int block, uint32_t address, int bytes);
  void wait(uint32_t address, unsigned parity);
  // Will be done at any time from now on, for each block of the mask.
  void copy(uint32_t target, const CUtensorMap& map, int dim, int row, uint32_t barrier, unsigned blocks);
  void cluster_barrier();
  Warpgroup& warpgroup();

  static uint32_t shared_start();

 private:
  struct Copy {
    int block;
    uint32_t target;
    CUtensorMap map;
    int dim, row;
    uint32_t barrier;
    race::Order issued;
  };

  MemoryBarrier& barrier(int block, uint32_t address);
  void run(const Copy& copy);

  int blocks_;
  size_t shared_bytes_;
  std::vector<SharedMemory> memory_;                         // of each block
  std::vector<std::map<uint32_t, MemoryBarrier>> barriers_;  // of each block, by address
  std::vector<Copy> copies_;                                 // that have been asked for
  std::vector<Warpgroup> warpgroups_;
  int cluster_arrived_ = 0;
  unsigned cluster_generation_ = 0;
  race::Order cluster_order_[2];
  race::Agent engine_{"copy engine"};
};

}  // namespace emulation::hopper
