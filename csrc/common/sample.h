// Arguments and results of the sample ops, with their checks, for both backends.
#pragma once

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/philox.h"

namespace splade_fast {

struct SampleOptions {
  int64_t num_samples;
  double scale, inv_temp;
  std::optional<int64_t> top_k;
  bool exact;
  int64_t slot_offset, query_offset;
};

// Slots that take no part: they are never drawn and add nothing to the logsumexp.
struct SampleMasks {
  std::optional<Tensor> valid;    // bool (slots,) or (queries, slots)
  std::optional<Tensor> exclude;  // bool (queries, slots), or int64 (queries, any) slots
};

inline SampleMasks contiguous_masks(const SampleMasks& masks) {
  return {contiguous_or_none(masks.valid), contiguous_or_none(masks.exclude)};
}

inline void check_slot_mask(const char* name, const Tensor& mask, int64_t queries, int64_t slots) {
  const bool is_per_query = mask.dim() == 2;
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && (is_per_query || mask.dim() == 1) &&
                      mask.size(mask.dim() - 1) == slots && (!is_per_query || mask.size(0) == queries),
                  name, " must be bool (", slots, ",) or (", queries, ", ", slots, "), got ", describe(mask));
}

inline void check_sample(const SampleOptions& options, const SampleMasks& masks, const Tensor& state,
                         const Tensor& like, int64_t queries, int64_t slots) {
  STD_TORCH_CHECK(options.num_samples >= 1, "num_samples must be at least 1, got ", options.num_samples);
  STD_TORCH_CHECK(std::isfinite(options.scale), "scale must be finite, got ", options.scale);
  STD_TORCH_CHECK(std::isfinite(options.inv_temp) && options.inv_temp >= 0,
                  "inv_temp must be finite and at least 0, got ", options.inv_temp);
  STD_TORCH_CHECK(!options.top_k || *options.top_k >= 1, "top_k must be at least 1, got ", *options.top_k);
  STD_TORCH_CHECK(options.slot_offset >= 0 && options.slot_offset <= philox::kMaxSlots - slots,
                  "slot_offset must be at least 0 and leave the slots below 2^34, got ", options.slot_offset);
  STD_TORCH_CHECK(options.query_offset >= 0 && options.query_offset <= philox::kMaxQueries - queries,
                  "query_offset must be at least 0 and leave the queries below 2^32, got ", options.query_offset);
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Long && state.dim() == 1 && state.size(0) == 2,
                  "state must be int64 (2,), got ", describe(state));
  STD_TORCH_CHECK(state.device() == like.device(), "state must be on the device of the scores");
  if (masks.valid) {
    check_slot_mask("valid", *masks.valid, queries, slots);
    STD_TORCH_CHECK(masks.valid->device() == like.device(), "valid must be on the device of the scores");
  }
  if (masks.exclude) {
    const Tensor& exclude = *masks.exclude;
    STD_TORCH_CHECK(exclude.device() == like.device(), "exclude must be on the device of the scores");
    STD_TORCH_CHECK(exclude.dim() == 2 && exclude.size(0) == queries, "exclude must be (queries, slots to exclude) = (",
                    queries, ", any), got ", describe(exclude));
    if (exclude.scalar_type() == ScalarType::Bool) {
      check_slot_mask("exclude", exclude, queries, slots);
    } else {
      STD_TORCH_CHECK(exclude.scalar_type() == ScalarType::Long, "exclude must be int64 slots or bool, got ",
                      torch::headeronly::toString(exclude.scalar_type()));
    }
  }
}

inline void check_dense_cache(const Tensor& queries, const Tensor& cache) {
  check_floating("queries", queries, 2);
  check_floating("cache", cache, 2);
  check_size("queries", queries, 1, cache.size(1));
  STD_TORCH_CHECK(queries.device() == cache.device(), "queries must be on the device of cache");
}

// Outputs of a sample op. All but indices are in the accumulation type.
struct Samples {
  Tensor scores, perturbed, logsumexp, indices;

  Samples(const Tensor& like, ScalarType dtype, int64_t queries, int64_t num_samples)
      : scores(new_tensor(like, std::vector<int64_t>{queries, num_samples}, dtype)),
        perturbed(new_tensor(like, std::vector<int64_t>{queries, num_samples}, dtype)),
        logsumexp(new_tensor(like, std::vector<int64_t>{queries}, dtype)),
        indices(new_tensor(like, std::vector<int64_t>{queries, num_samples}, ScalarType::Long)) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor> tuple() const { return {scores, perturbed, logsumexp, indices}; }
};

// sum * exp(difference): a sum of exponentials, relative to another maximum. An infinite sum, which has no finite
// maximum, stays infinite.
SPLADE_FAST_INLINE double scaled_sum(double sum, double difference) {
  return sum - sum == 0 ? sum * ::exp(difference) : sum;
}

// First slot of a group. Groups are contiguous, and their sizes differ by at most one: the larger ones come first.
SPLADE_FAST_INLINE int64_t group_start(int64_t group, int64_t groups, int64_t slots) {
  const int64_t extra = slots % groups;
  return group * (slots / groups) + (group < extra ? group : extra);
}

// Group of a slot.
inline int64_t find_group(int64_t slot, int64_t groups, int64_t slots) {
  const int64_t size = slots / groups, extra = slots % groups, in_larger = extra * (size + 1);
  return slot < in_larger ? slot / (size + 1) : extra + (slot - in_larger) / size;
}

}  // namespace splade_fast
