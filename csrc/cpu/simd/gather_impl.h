// Kernel of gather: ages of cached items.
#pragma once

#include "cpu/simd/isa.h"

namespace splade_fast::cpu {
namespace {

// Add one to every age, and return the largest former age. The addition is unsigned, so that the largest age wraps
// around as in PyTorch.
inline int32_t grow_older(int32_t* age, int64_t count) {
  typedef uint32_t Unsigned __attribute__((vector_size(kVectorBytes)));
  using Ages = Mask<float>;
  Ages largest = broadcast<Ages>(INT32_MIN);
  int64_t i = 0;
  for (; i + kLanes<float> <= count; i += kLanes<float>) {
    const Ages before = load_bits<Ages>(age + i);
    largest = before > largest ? before : largest;
    store_bits(age + i, reinterpret_cast<Unsigned>(before) + 1);
  }
  int32_t result = INT32_MIN;
  for (int lane = 0; lane < kLanes<float>; ++lane) result = largest[lane] > result ? largest[lane] : result;
  for (; i < count; ++i) {
    result = age[i] > result ? age[i] : result;
    age[i] = static_cast<int32_t>(static_cast<uint32_t>(age[i]) + 1);
  }
  return result;
}

}  // namespace
}  // namespace splade_fast::cpu
