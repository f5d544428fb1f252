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

template <typename To, typename From>
SPLADE_FAST_INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

SPLADE_FAST_INLINE uint32_t bits_of(float x) { return same_bits<uint32_t>(x); }
SPLADE_FAST_INLINE uint64_t bits_of(double x) { return same_bits<uint64_t>(x); }
SPLADE_FAST_INLINE float float_of(uint32_t bits) { return same_bits<float>(bits); }
SPLADE_FAST_INLINE double float_of(uint64_t bits) { return same_bits<double>(bits); }

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
