// Floating-point values as integers, on host and device: their bits, and keys that are in the order of the values.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define SPLADE_FAST_INLINE __host__ __device__ inline
#else
#define SPLADE_FAST_INLINE inline
#endif

namespace splade_fast {

#if defined(__CUDA_ARCH__)
__device__ inline uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint64_t bits_of(double x) { return static_cast<uint64_t>(__double_as_longlong(x)); }
__device__ inline double float_of(uint64_t bits) { return __longlong_as_double(static_cast<long long>(bits)); }
#else
SPLADE_FAST_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
SPLADE_FAST_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
SPLADE_FAST_INLINE uint64_t bits_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
SPLADE_FAST_INLINE double float_of(uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
#endif

// Unsigned integers in the order of the values: -0 equals 0, and every NaN is above everything. No value has key 0.
template <typename Acc>
using OrderedKey = std::conditional_t<std::is_same_v<Acc, double>, uint64_t, uint32_t>;

template <typename Acc>
SPLADE_FAST_INLINE OrderedKey<Acc> to_key(Acc value) {
  using Key = OrderedKey<Acc>;
  constexpr Key kSign = Key(1) << (8 * sizeof(Acc) - 1);
  if (value != value) return ~Key(0);
  const Key bits = value == Acc(0) ? Key(0) : bits_of(value);
  return bits & kSign ? ~bits : bits | kSign;
}

template <typename Acc>
SPLADE_FAST_INLINE Acc from_key(OrderedKey<Acc> key) {
  using Key = OrderedKey<Acc>;
  constexpr Key kSign = Key(1) << (8 * sizeof(Acc) - 1);
  return float_of(key & kSign ? key ^ kSign : ~key);
}

}  // namespace splade_fast
