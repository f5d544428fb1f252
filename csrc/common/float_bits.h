// Floating-point values as integers, for host and device: their bits, and keys that sort as the values do.
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
SPLADE_FAST_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

SPLADE_FAST_INLINE uint32_t to_bits(float x) { return bit_cast<uint32_t>(x); }
SPLADE_FAST_INLINE uint64_t to_bits(double x) { return bit_cast<uint64_t>(x); }
SPLADE_FAST_INLINE float from_bits(uint32_t bits) { return bit_cast<float>(bits); }
SPLADE_FAST_INLINE double from_bits(uint64_t bits) { return bit_cast<double>(bits); }

// Unsigned integer that sorts as the value does: -0 equals 0, NaN is above all numbers, and no value has key 0.
template <typename Acc>
using OrderedKey = std::conditional_t<std::is_same_v<Acc, double>, uint64_t, uint32_t>;

template <typename Acc>
SPLADE_FAST_INLINE OrderedKey<Acc> to_key(Acc value) {
  using Key = OrderedKey<Acc>;
  constexpr Key kSign = Key(1) << (8 * sizeof(Acc) - 1);
  if (value != value) return ~Key(0);
  const Key bits = value == Acc(0) ? Key(0) : to_bits(value);
  return bits & kSign ? ~bits : bits | kSign;
}

template <typename Acc>
SPLADE_FAST_INLINE Acc from_key(OrderedKey<Acc> key) {
  using Key = OrderedKey<Acc>;
  constexpr Key kSign = Key(1) << (8 * sizeof(Acc) - 1);
  return from_bits(key & kSign ? key ^ kSign : ~key);
}

}  // namespace splade_fast
