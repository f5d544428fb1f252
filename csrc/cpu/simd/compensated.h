// Sums of many parts that do not lose what rounding takes from them.
#pragma once

namespace splade_fast::cpu {
namespace {

// total += part; lost is what the additions so far have rounded off. Numbers or vectors of them. A part of 0 changes
// neither, so parts may be left out that are known to be 0.
template <typename V>
inline void add_part(V& total, V& lost, V part) {
  const V sum = total + part, added = sum - total;
  lost += (total - (sum - added)) + (part - added);
  total = sum;
}

// The sum once all parts are in. Where it is infinite, nothing is known of what was lost.
template <typename Acc>
inline Acc whole_sum(Acc total, Acc lost) {
  return lost == lost ? total + lost : total;
}

}  // namespace
}  // namespace splade_fast::cpu
