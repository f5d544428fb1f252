// Criteria by which prune keeps entries of a row, with their checks, for both backends.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/checks.h"

namespace splade_fast {

// An entry is kept if it passes every criterion that is set. NaN is larger than all numbers; of equal entries the one
// with the lower column counts as larger.
struct Criteria {
  std::optional<int64_t> k;         // the entry is among the k largest
  std::optional<double> threshold;  // not entry <= threshold
  std::optional<double> max_ratio;  // not entry < max_ratio * largest entry
  std::optional<double> mass;       // the entry is among the fewest largest whose sum reaches mass * sum of the row

  int64_t width(int64_t columns) const { return k ? std::min(*k, columns) : columns; }
  bool has_full_rows() const { return !threshold && !max_ratio && !mass; }
};

inline Criteria check_criteria(const Tensor& x, std::optional<int64_t> k, std::optional<double> threshold,
                               std::optional<double> max_ratio, std::optional<double> mass) {
  check_floating("x", x, 2);
  STD_TORCH_CHECK(x.size(1) <= INT32_MAX - 64, "x must have columns that fit int32, got ", x.size(1));
  STD_TORCH_CHECK(!k || *k >= 0, "k must be at least 0, got ", *k);
  STD_TORCH_CHECK(!threshold || !std::isnan(*threshold), "threshold must not be NaN");
  STD_TORCH_CHECK(!max_ratio || (*max_ratio >= 0 && *max_ratio <= 1), "max_ratio must be between 0 and 1, got ",
                  *max_ratio);
  STD_TORCH_CHECK(!mass || (*mass >= 0 && *mass <= 1), "mass must be between 0 and 1, got ", *mass);
  if (k) k = std::min(*k, x.size(1));
  return {k, threshold, max_ratio, mass};
}

}  // namespace splade_fast
