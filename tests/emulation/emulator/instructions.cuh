// In the place of csrc/cuda/head/sm90/instructions.cuh: its functions, on the emulated machine. What only orders
// memory, prefetches or shares out registers does nothing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda/head/sm90/layout.h"
#include "cuda/warp.cuh"

#define SPLADE_FAST_SM90A 1

namespace splade_fast::cuda::hopper {

using emulation::hopper::Machine;

inline uint32_t shared_address(const void* /*dynamic shared memory, which has no other address*/) {
  return Machine::shared_start();
}

inline void init_barrier(uint32_t barrier, int arrivals) { Machine::current().init_barrier(barrier, arrivals); }

inline void fence_barrier_init() {}

inline void arrive_and_expect(uint32_t barrier, int bytes) {
  Machine::current().arrive(emulation::current_block(), barrier, bytes);
}

inline void arrive(uint32_t barrier) { Machine::current().arrive(emulation::current_block(), barrier, 0); }

inline void arrive_at_block(uint32_t barrier, int block) { Machine::current().arrive(block, barrier, 0); }

inline void wait(uint32_t barrier, uint32_t parity) { Machine::current().wait(barrier, parity); }

inline void prefetch(const CUtensorMap&) {}

inline void copy_tile(uint32_t target, const CUtensorMap& map, int dim, int row, uint32_t barrier) {
  Machine::current().copy(target, map, dim, row, barrier, 1u << emulation::current_block());
}

inline void copy_tile_to_blocks(uint32_t target, const CUtensorMap& map, int dim, int row, uint32_t barrier,
                                uint16_t blocks) {
  Machine::current().copy(target, map, dim, row, barrier, blocks);
}

inline int block_in_cluster() { return emulation::current_block(); }

inline void cluster_sync() { Machine::current().cluster_barrier(); }

template <int kRegisters>
void give_up_registers() {}

template <int kRegisters>
void take_registers() {}

inline void wgmma_fence() {}

inline void wgmma_commit() { Machine::current().warpgroup().commit(); }

template <int kPending>
void wgmma_wait() {
  Machine::current().warpgroup().wait(kPending);
}

template <typename Sum, int kCount>
void pin(Sum (&)[kCount]) {}

template <Operand kOperand>
struct Emulated;
template <>
struct Emulated<Operand::kBfloat16> {
  using Element = emulation::hopper::Bfloat16;
};
template <>
struct Emulated<Operand::kFloat16> {
  using Element = emulation::hopper::Float16;
};
template <>
struct Emulated<Operand::kTfloat32> {
  using Element = emulation::hopper::Tfloat32;
};
template <>
struct Emulated<Operand::kInt8> {
  using Element = emulation::hopper::Int8;
};

template <Operand kOperand>
void wgmma(OperandSum<kOperand> (&d)[128], uint64_t a, uint64_t b, int accumulate) {
  Machine::current().warpgroup().multiply<typename Emulated<kOperand>::Element>(d, a, b, accumulate != 0);
}

}  // namespace splade_fast::cuda::hopper
