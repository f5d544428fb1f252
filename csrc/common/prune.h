// What of a row prune keeps, checked for both backends.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/checks.h"

namespace splade_fast {

// An entry is kept that passes all criteria; one that is not set passes everything.
struct Criteria {
  std::optional<int64_t> k;         // among the k largest; ties go to the lowest column, NaN is the largest
  std::optional<double> threshold;  // not <= it
  std::optional<double> max_ratio;  // not < max_ratio times the largest
  std::optional<double> mass;       // among the fewest largest whose sum reaches mass times the sum

  int64_t width(int64_t columns) const { return k ? std::min(*k, columns) : columns; }
  bool every_row_is_full() const { return !threshold && !max_ratio && !mass; }
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
