// Compensated summation.
#pragma once

namespace splade_fast::cpu {
namespace {

// total += part, for numbers or vectors. lost is the sum of the rounding errors so far. A part of 0 changes neither, so
// parts that are known to be 0 may be left out.
template <typename V>
inline void add_part(V& total, V& lost, V part) {
  const V sum = total + part, added = sum - total;
  lost += (total - (sum - added)) + (part - added);
  total = sum;
}

// The sum of all parts. lost is NaN where the sum has overflowed.
template <typename Acc>
inline Acc whole_sum(Acc total, Acc lost) {
  return lost == lost ? total + lost : total;
}

}  // namespace
}  // namespace splade_fast::cpu
