// Barriers of a block, and what the threads of a warp exchange. Threads that meet at different lines are divergent.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "scheduler.h"

namespace emulation {

// For as many blocks and warps as run at a time.
void reset_synchronization(int blocks, int warps);

// __syncthreads: how many threads of the block came with a value that is true.
int block_barrier(bool value, Site site);

// __syncwarp.
void warp_barrier(unsigned mask, Site site);

// Every lane gives a word and gets those of all. Does not order memory, as CUDA's shuffles and votes do not.
using WarpWords = std::array<uint64_t, 32>;
WarpWords exchange(unsigned mask, uint64_t word, Site site);

int lane();

// A lane does something that the others of its warp may not do. Before the warp meets again, no instruction may take
// whole warps.
void act_alone();
void expect_whole_warp();

template <typename T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  const WarpWords words = exchange(mask, word, site);
  std::memcpy(&value, &words[static_cast<size_t>(source & 31)], sizeof(T));
  return value;
}

// Bit i: whether lane i gave this word.
unsigned lanes_with(uint64_t word, const WarpWords& words);

}  // namespace emulation
