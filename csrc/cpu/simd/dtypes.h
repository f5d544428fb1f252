// Element types of the CPU kernels.
#pragma once

#include <cstdint>
#include <type_traits>

namespace splade_fast::cpu {

struct bfloat16 {
  uint16_t bits;
};

using float16 = _Float16;

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Signed integer as wide as Acc. A vector of positions thus has as many lanes as the vector of maxima that it belongs
// to.
template <typename Acc>
using Position = std::conditional_t<std::is_same_v<Acc, double>, int64_t, int32_t>;

// Signed integer that sorts as a value of Acc does: -0 equals 0, and NaN is above all numbers.
template <typename Acc>
using SortKey = Position<Acc>;

}  // namespace splade_fast::cpu
