// Instructions of sm_90a without a name in CUDA C++: barriers that count bytes, tensor copies, wgmma, clusters.
// Addresses belong to the shared window. Only kernels under SPLADE_FAST_SM90A may use them.
#pragma once

#include <cuda.h>

#include "cuda/head/sm90/layout.h"
#include "cuda/warp.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SPLADE_FAST_SM90A 1
#endif

#if defined(SPLADE_FAST_SM90A)
namespace splade_fast::cuda::hopper {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Barriers -------------------------------------------------------------------------------------------------------

__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and keeps the phase of the barrier open until the given number of bytes has been copied.
__device__ inline void arrive_and_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the same barrier of any block of the cluster. Orders the accesses that this thread has waited for, such as
// the reads of its wgmmas; a release at the scope of the cluster would add a fence of the whole device.
__device__ inline void arrive_at_block(uint32_t barrier, int block) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(barrier),
      "r"(block)
      : "memory");
}

// Waits until the phase of the given parity has ended. A fresh barrier passes for parity 1.
__device__ inline void wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// Tensor copies --------------------------------------------------------------------------------------------------

__device__ inline void prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ inline void copy_tile(uint32_t target, const CUtensorMap& map, int dim, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          target),
      "l"(&map), "r"(dim), "r"(row), "r"(barrier)
      : "memory");
}

// Copies to the same address in every block of the mask; the bytes count at the same barrier of each block.
__device__ inline void copy_tile_to_blocks(uint32_t target, const CUtensorMap& map, int dim, int row, uint32_t barrier,
                                           uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
      "l"(&map), "r"(dim), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

// Clusters and warpgroups ----------------------------------------------------------------------------------------

__device__ inline int block_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Synchronises every thread of every block of the cluster.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

template <int kRegisters>
__device__ inline void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// wgmma ----------------------------------------------------------------------------------------------------------

// Required before the first wgmma after other accesses to the accumulators or to shared memory.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending committed groups are unfinished.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads or writes of the accumulators across this point.
template <int kCount>
__device__ inline void pin(float (&accumulators)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(accumulators[i])::"memory");
}

template <int kCount>
__device__ inline void pin(int32_t (&accumulators)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(accumulators[i])::"memory");
}

// clang-format off
#define SPLADE_FAST_D8(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), \
                                c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define SPLADE_FAST_D32(c, d, i) SPLADE_FAST_D8(c, d, i), SPLADE_FAST_D8(c, d, i + 8), \
                                 SPLADE_FAST_D8(c, d, i + 16), SPLADE_FAST_D8(c, d, i + 24)
// Arguments: dimensions and types, the register constraint of the sums, and the immediates behind scale-d: the signs of
// a and b for floats, and whether a and b are transposed for types of two bytes.
#define SPLADE_FAST_WGMMA_M64N256(dims_and_types, constraint, immediates)                               \
  asm volatile(                                                                                          \
      "{\n"                                                                                              \
      ".reg .pred p;\n"                                                                                  \
      "setp.ne.b32 p, %130, 0;\n"                                                                        \
      "wgmma.mma_async.sync.aligned.m64n256" dims_and_types " "                                         \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                          \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                 \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                 \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                 \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                 \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                 \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "     \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}," \
      " %128, %129, p" immediates ";\n"                                                                  \
      "}\n"                                                                                              \
      : SPLADE_FAST_D32(constraint, d, 0), SPLADE_FAST_D32(constraint, d, 32),                           \
        SPLADE_FAST_D32(constraint, d, 64), SPLADE_FAST_D32(constraint, d, 96)                           \
      : "l"(a), "l"(b), "r"(accumulate))
// clang-format on

// d = a b^T, or d += a b^T: 64 entries x 256 tokens over kInstructionBytes of dimensions.
template <Operand kOperand>
__device__ inline void wgmma(OperandSum<kOperand> (&d)[128], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (kOperand == Operand::kBfloat16) {
    SPLADE_FAST_WGMMA_M64N256("k16.f32.bf16.bf16", "+f", ", 1, 1, 0, 0");
  } else if constexpr (kOperand == Operand::kFloat16) {
    SPLADE_FAST_WGMMA_M64N256("k16.f32.f16.f16", "+f", ", 1, 1, 0, 0");
  } else if constexpr (kOperand == Operand::kTfloat32) {
    SPLADE_FAST_WGMMA_M64N256("k8.f32.tf32.tf32", "+f", ", 1, 1");
  } else {
    SPLADE_FAST_WGMMA_M64N256("k32.s32.s8.s8", "+r", "");
  }
}

#undef SPLADE_FAST_WGMMA_M64N256
#undef SPLADE_FAST_D32
#undef SPLADE_FAST_D8

}  // namespace splade_fast::cuda::hopper
#endif
