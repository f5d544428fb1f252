// Slots that take no part, for a block of queries.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "common/sample.h"

namespace splade_fast::cpu {

// Mask that sets the scores of invalid and excluded slots to -inf.
class BlockMask {
 public:
  BlockMask(const SampleMasks& masks, int64_t slots, int64_t first_query, int64_t queries)
      : slots_(slots), queries_(queries) {
    if (masks.valid) {
      is_per_query_ = masks.valid->dim() == 2;
      valid_mask_ = const_data<bool>(*masks.valid) + (is_per_query_ ? first_query * slots : 0);
    }
    if (!masks.exclude) return;
    if (masks.exclude->scalar_type() == ScalarType::Bool) {
      exclude_mask_ = const_data<bool>(*masks.exclude) + first_query * slots;
      return;
    }
    const int64_t width = masks.exclude->size(1);
    const int64_t* listed = const_data<int64_t>(*masks.exclude) + first_query * width;
    for (int64_t i = 0; i < queries * width; ++i) {
      if (listed[i] >= 0 && listed[i] < slots) excluded_.push_back({listed[i], i / width});
    }
    std::sort(excluded_.begin(), excluded_.end());
  }

  // Return false only if no query may draw a slot of [begin, end).
  bool has_valid_slot(int64_t begin, int64_t end) const {
    return !valid_mask_ || is_per_query_ ||
           std::any_of(valid_mask_ + begin, valid_mask_ + end, [](bool is_valid) { return is_valid; });
  }

  template <typename Acc>
  void apply(Acc* scores, int64_t lanes, int64_t begin, int64_t end) const {
    constexpr Acc kMasked = -std::numeric_limits<Acc>::infinity();
    if (valid_mask_ && !is_per_query_) {
      for (int64_t n = begin; n < end; ++n) {
        if (!valid_mask_[n]) std::fill_n(scores + (n - begin) * lanes, lanes, kMasked);
      }
    }
    for (const bool* mask : {is_per_query_ ? valid_mask_ : nullptr, exclude_mask_}) {
      if (!mask) continue;
      for (int64_t q = 0; q < queries_; ++q) {
        for (int64_t n = begin; n < end; ++n) {
          if (mask[q * slots_ + n] == (mask == exclude_mask_)) scores[(n - begin) * lanes + q] = kMasked;
        }
      }
    }
    const auto first = std::lower_bound(excluded_.begin(), excluded_.end(), Excluded{begin, 0});
    for (auto pair = first; pair != excluded_.end() && pair->first < end; ++pair) {
      scores[(pair->first - begin) * lanes + pair->second] = kMasked;
    }
  }

 private:
  using Excluded = std::pair<int64_t, int64_t>;  // slot, query

  int64_t slots_, queries_;
  const bool *valid_mask_ = nullptr, *exclude_mask_ = nullptr;
  bool is_per_query_ = false;
  std::vector<Excluded> excluded_;
};

}  // namespace splade_fast::cpu
