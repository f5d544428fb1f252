// Element types of tensors as the CPU kernels see them.
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

// Positions ride beside running maxima in vectors of the same number of lanes, so they are as wide.
template <typename Acc>
using Position = std::conditional_t<std::is_same_v<Acc, double>, int64_t, int32_t>;

}  // namespace splade_fast::cpu
