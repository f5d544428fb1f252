// The words and functions of CUDA C++ that kernels of csrc/cuda use, for a host compiler and the scheduler's fibers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "shared_variables.h"
#include "synchronization.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Arithmetic -----------------------------------------------------------------------------------------------------

using std::isfinite;

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

inline float __int_as_float(int x) {
  float result;
  std::memcpy(&result, &x, sizeof(x));
  return result;
}

// Atomics: relaxed, as CUDA's. Seldom do all lanes of a warp come to one -----------------------------------------

template <typename T, typename V>
T atomicAdd(T* target, V value) {
  emulation::act_alone();
  return __atomic_fetch_add(target, static_cast<T>(value), __ATOMIC_RELAXED);
}

template <typename T>
T atomicMax(T* target, T value) {
  emulation::act_alone();
  T old = __atomic_load_n(target, __ATOMIC_RELAXED);
  while (value > old && !__atomic_compare_exchange_n(target, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

template <typename T>
T atomicOr(T* target, T value) {
  emulation::act_alone();
  return __atomic_fetch_or(target, value, __ATOMIC_RELAXED);
}

inline int atomicExch(int* target, int value) {
  emulation::act_alone();
  return __atomic_exchange_n(target, value, __ATOMIC_RELAXED);
}

// Synchronization ------------------------------------------------------------------------------------------------

#define EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_SITE) { emulation::block_barrier(false, {file, line}); }

inline int __syncthreads_or(int value, EMULATION_SITE) {
  return emulation::block_barrier(value != 0, {file, line}) > 0;
}

inline int __syncthreads_and(int value, EMULATION_SITE) {
  return emulation::block_barrier(value != 0, {file, line}) == emulation::threads_per_block();
}

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_SITE) { emulation::warp_barrier(mask, {file, line}); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, EMULATION_SITE) {
  return emulation::shuffle(mask, value, source, {file, line});
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, EMULATION_SITE) {
  const int source = emulation::lane() - static_cast<int>(delta);
  return emulation::shuffle(mask, value, source < 0 ? emulation::lane() : source, {file, line});
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, EMULATION_SITE) {
  const int source = emulation::lane() + static_cast<int>(delta);
  return emulation::shuffle(mask, value, source > 31 ? emulation::lane() : source, {file, line});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, EMULATION_SITE) {
  return emulation::shuffle(mask, value, emulation::lane() ^ lanes, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int value, EMULATION_SITE) {
  return emulation::lanes_with(1, emulation::exchange(mask, value != 0, {file, line}));
}

inline int __any_sync(unsigned mask, int value, EMULATION_SITE) {
  return emulation::lanes_with(1, emulation::exchange(mask, value != 0, {file, line})) != 0;
}

inline unsigned __match_any_sync(unsigned mask, int value, EMULATION_SITE) {
  const uint64_t word = static_cast<uint32_t>(value);
  return emulation::lanes_with(word, emulation::exchange(mask, word, {file, line}));
}

#undef EMULATION_SITE
