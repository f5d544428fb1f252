// Draws from tiles of scores (slots, lanes), with a lane for each query of a block. Any source may compute the scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

#include "common/sample.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/sample/block_mask.h"
#include "cpu/sample/draws.h"
#include "cpu/score/selection.h"
#include "cpu/simd/kernels.h"

namespace splade_fast::cpu {

// Draws of one block of queries from all slots. make_source() returns a source of scores for one thread, which has:
//   int64_t tile_slots()                     the number of slots of a tile, a multiple of 4;
//   Acc* scores(int64_t begin, int64_t end)  scaled scores (end - begin, lanes), or nullptr if an argument is invalid.
template <typename Acc>
class BlockSampler {
 public:
  BlockSampler(const SampleOptions& options, const SampleMasks& masks, const philox::State& state, int64_t slots,
               int64_t first_query, int64_t queries, int64_t lanes)
      : options_(options),
        mask_(masks, slots, first_query, queries),
        state_(state),
        slots_(slots),
        queries_(queries),
        lanes_(lanes),
        first_query_(options.query_offset + first_query),
        draws_(queries, Draws<Acc>(options.num_samples)) {}

  template <typename MakeSource>
  void run(const MakeSource& make_source) {
    if (!options_.top_k || *options_.top_k >= slots_) {
      draw_from_all(make_source);
    } else if (options_.exact) {
      draw_from_highest(make_source, *options_.top_k);
    } else {
      draw_from_groups(make_source, *options_.top_k);
    }
  }

  void store(const Samples& samples, int64_t first) const {
    const int64_t samples_per_query = options_.num_samples;
    for (int64_t q = 0; q < queries_; ++q) {
      const std::vector<Draw<Acc>> draws = draws_[q].sorted();
      const int64_t row = (first + q) * samples_per_query;
      Acc* scores = mutable_data<Acc>(samples.scores) + row;
      Acc* perturbed = mutable_data<Acc>(samples.perturbed) + row;
      int64_t* indices = mutable_data<int64_t>(samples.indices) + row;
      std::fill_n(scores, samples_per_query, -kInf);
      std::fill_n(perturbed, samples_per_query, -kInf);
      std::fill_n(indices, samples_per_query, int64_t{-1});
      for (size_t i = 0; i < draws.size(); ++i) {
        scores[i] = draws[i].score;
        perturbed[i] = draws[i].perturbed;
        indices[i] = draws[i].slot;
      }
      mutable_data<Acc>(samples.logsumexp)[first + q] = merge_logsumexp(maximum_, sum_, q, parts_, lanes_);
    }
  }

 private:
  using Key = SortKey<Acc>;
  static constexpr Acc kInf = std::numeric_limits<Acc>::infinity();
  static constexpr float kAboveNoise = 46;  // larger than all noise, see gumbel()
  // One thread sums up each part, so the number of threads does not change the result. At most kMaxParts parts take
  // little memory.
  static constexpr int64_t kMinPartSlots = 1024, kMaxParts = 256;

  int64_t part_slots(int64_t tile) const {
    return round_up(std::max(kMinPartSlots, ceil_div(slots_, kMaxParts)), tile);
  }

  void start_parts(int64_t parts) {
    parts_ = parts;
    maximum_.assign(parts * lanes_, -kInf);
    sum_.assign(parts * lanes_, Acc(0));
  }

  // Call body(source, draws, part) for each part. Each thread has its own draws, which are merged at the end.
  template <typename MakeSource, typename Body>
  void for_each_part(const MakeSource& make_source, int64_t parts, const Body& body) {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      auto source = make_source();
      std::vector<Draws<Acc>> draws(queries_, Draws<Acc>(options_.num_samples));
      for (int64_t part = begin; part < end; ++part) body(source, draws, part);
      const std::lock_guard<std::mutex> lock(mutex_);
      for (int64_t q = 0; q < queries_; ++q) draws_[q].add(draws[q]);
    });
  }

  // Call body(scores, begin, end) for each tile of slots [begin, end) that has a valid slot.
  template <typename Source, typename Body>
  void for_each_tile(Source& source, int64_t begin, int64_t end, const Body& body) const {
    for (int64_t n = begin; n < end; n += source.tile_slots()) {
      const int64_t last = std::min(n + source.tile_slots(), end);
      if (!mask_.has_valid_slot(n, last)) continue;
      Acc* scores = source.scores(n, last);
      if (!scores) return;
      mask_.apply(scores, lanes_, n, last);
      body(scores, n, last);
    }
  }

  void draw(int64_t q, int64_t slot, Acc score, uint32_t word, Draws<Acc>& draws) const {
    if (score == -kInf) return;
    const float noise = philox::gumbel_from_word(state_, word, static_cast<uint32_t>(first_query_ + q),
                                                 static_cast<uint64_t>(options_.slot_offset + slot));
    add_drawable(philox::perturb(score, static_cast<Acc>(options_.inv_temp), noise), score, slot, draws);
  }

  // The product with inv_temp may overflow to -inf. Such a slot is not drawn, as one whose score is -inf.
  static void add_drawable(Acc perturbed, Acc score, int64_t slot, Draws<Acc>& draws) {
    if (perturbed != -kInf) draws.add({perturbed, score, slot});
  }

  template <typename MakeSource>
  void draw_from_all(const MakeSource& make_source) {
    const int64_t slots_of_part = part_slots(make_source().tile_slots());
    start_parts(ceil_div(slots_, slots_of_part));
    for_each_part(make_source, parts_, [&](auto& source, std::vector<Draws<Acc>>& draws, int64_t part) {
      const int64_t tile = source.tile_slots() * lanes_;
      const Scratch<int32_t> places(tile);
      const Scratch<uint32_t> words(tile);
      std::vector<Acc> bounds(lanes_, kInf);
      for (int64_t q = 0; q < queries_; ++q) bounds[q] = draws[q].bound();
      const int64_t first = part * slots_of_part, end = std::min(first + slots_of_part, slots_);
      for_each_tile(source, first, end, [&](const Acc* scores, int64_t begin, int64_t last) {
        const int64_t found = kernels<Acc>().sample_tile(
            {scores, last - begin, lanes_, state_, static_cast<uint64_t>(options_.slot_offset + begin),
             static_cast<uint64_t>(first_query_), static_cast<Acc>(options_.inv_temp), bounds.data(),
             maximum_.data() + part * lanes_, sum_.data() + part * lanes_, places.get(), words.get()});
        for (int64_t i = 0; i < found; ++i) {
          const int64_t place = places.get()[i], q = place % lanes_;
          if (q >= queries_) continue;
          draw(q, begin + place / lanes_, scores[place], words.get()[i], draws[q]);
          bounds[q] = draws[q].bound();
        }
      });
    });
  }

  // Add the kept scores of a query, which are `stride` apart, to its draws and, as one part, to its logsumexp.
  void draw_from_kept(int64_t q, const Acc* scores, const int64_t* slots, int64_t stride, int64_t count, int64_t part,
                      Draws<Acc>& draws) {
    Acc maximum = -kInf;
    for (int64_t i = 0; i < count; ++i) maximum = scores[i * stride] > maximum ? scores[i * stride] : maximum;
    const Acc reference = std::isfinite(maximum) ? maximum : Acc(0);
    constexpr int64_t kRun = 64;  // summing in runs reduces the rounding error
    double sum = 0;
    for (int64_t first = 0; first < count; first += kRun) {
      double run_sum = 0;
      for (int64_t i = first; i < std::min(first + kRun, count); ++i) {
        run_sum += std::exp(scores[i * stride] - reference);
      }
      sum += run_sum;
    }
    maximum_[part * lanes_ + q] = maximum;
    sum_[part * lanes_ + q] = static_cast<Acc>(sum);
    const Acc inv_temp = static_cast<Acc>(options_.inv_temp);
    for (int64_t i = 0; i < count; ++i) {
      const Acc score = scores[i * stride];
      const int64_t slot = slots[i * stride], number = options_.slot_offset + slot;
      if (score == -kInf || philox::perturb(score, inv_temp, kAboveNoise) < draws.bound()) continue;
      const float noise =
          philox::gumbel_at_slot(state_, static_cast<uint32_t>(first_query_ + q), static_cast<uint64_t>(number));
      add_drawable(philox::perturb(score, inv_temp, noise), score, slot, draws);
    }
  }

  // Maxima (groups, lanes) of neighbouring groups, and the slots of these maxima.
  struct GroupMaxima {
    int64_t lanes;
    std::vector<Acc> score;
    std::vector<Position<Acc>> position;  // within the slots of one call of reduce_groups()
    std::vector<int64_t> slot;

    GroupMaxima(int64_t groups, int64_t lanes)
        : lanes(lanes), score(groups * lanes, -kInf), position(groups * lanes, 0), slot(groups * lanes) {}
  };

  // Find the maxima of slots [begin, end), which are the groups from first_group on or a piece of first_group.
  template <typename Source>
  void reduce_groups(Source& source, int64_t begin, int64_t end, int64_t first_group, int64_t groups,
                     GroupMaxima& maxima) const {
    std::fill(maxima.score.begin(), maxima.score.end(), -kInf);
    std::fill(maxima.position.begin(), maxima.position.end(), Position<Acc>(0));
    int64_t group = first_group;
    for_each_tile(source, begin, end, [&](const Acc* scores, int64_t first, int64_t last) {
      for (int64_t n = first; n < last;) {
        while (group_start(group + 1, groups, slots_) <= n) ++group;
        const int64_t stop = std::min(last, group_start(group + 1, groups, slots_));
        const int64_t row = (group - first_group) * lanes_;
        kernels<Acc>().group_maximum(scores + (n - first) * lanes_, n - begin, stop - n, lanes_,
                                     maxima.score.data() + row, maxima.position.data() + row);
        n = stop;
      }
    });
    for (size_t i = 0; i < maxima.slot.size(); ++i) maxima.slot[i] = begin + maxima.position[i];
  }

  template <typename MakeSource>
  void draw_from_groups(const MakeSource& make_source, int64_t groups) {
    const int64_t largest = ceil_div(slots_, groups), slots_of_part = part_slots(make_source().tile_slots());
    if (largest > slots_of_part) {
      draw_from_large_groups(make_source, groups, ceil_div(largest, slots_of_part));
      return;
    }
    const int64_t groups_of_part = slots_of_part / largest;
    start_parts(ceil_div(groups, groups_of_part));
    for_each_part(make_source, parts_, [&](auto& source, std::vector<Draws<Acc>>& draws, int64_t part) {
      const int64_t first = part * groups_of_part, last = std::min(first + groups_of_part, groups);
      GroupMaxima maxima(last - first, lanes_);
      reduce_groups(source, group_start(first, groups, slots_), group_start(last, groups, slots_), first, groups,
                    maxima);
      for (int64_t q = 0; q < queries_; ++q) {
        draw_from_kept(q, maxima.score.data() + q, maxima.slot.data() + q, lanes_, last - first, part, draws[q]);
      }
    });
  }

  // Cut each group into pieces, so that all threads have work.
  template <typename MakeSource>
  void draw_from_large_groups(const MakeSource& make_source, int64_t groups, int64_t pieces) {
    std::vector<GroupMaxima> found(groups * pieces, GroupMaxima(1, lanes_));
    for_each_part(make_source, groups * pieces, [&](auto& source, auto&, int64_t part) {
      const int64_t group = part / pieces, start = group_start(group, groups, slots_);
      const int64_t size = group_start(group + 1, groups, slots_) - start;
      const auto cut = [&](int64_t piece) { return start + size * piece / pieces; };
      reduce_groups(source, cut(part % pieces), cut(part % pieces + 1), group, groups, found[part]);
    });
    GroupMaxima maxima(groups, lanes_);
    for (int64_t i = 0; i < groups * lanes_; ++i) {
      const int64_t first = i / lanes_ * pieces, lane = i % lanes_;
      maxima.score[i] = found[first].score[lane];
      maxima.slot[i] = found[first].slot[lane];
      for (int64_t piece = first + 1; piece < first + pieces; ++piece) {
        const Acc score = found[piece].score[lane];
        if (score <= maxima.score[i] || maxima.score[i] != maxima.score[i]) continue;
        maxima.score[i] = score;
        maxima.slot[i] = found[piece].slot[lane];
      }
    }
    start_parts(1);
    for (int64_t q = 0; q < queries_; ++q) {
      draw_from_kept(q, maxima.score.data() + q, maxima.slot.data() + q, lanes_, groups, 0, draws_[q]);
    }
  }

  // Key of -inf, see to_keys() in score_impl.h. Only a score whose key is larger can be drawn.
  static Key lowest_key() {
    const Acc lowest = -kInf;
    Key bits;
    std::memcpy(&bits, &lowest, sizeof(bits));
    return bits ^ std::numeric_limits<Key>::max();
  }

  template <typename MakeSource>
  void draw_from_highest(const MakeSource& make_source, int64_t kept) {
    STD_TORCH_CHECK(slots_ <= INT32_MAX, "top_k with exact takes at most ", INT32_MAX, " slots, got ", slots_);
    const int64_t slots_of_part = part_slots(make_source().tile_slots());
    const int64_t capacity = kept + std::max(kept, kMinSpare);
    std::vector<std::vector<Selection<Acc>>> selections;
    torch::stable::parallel_for(0, ceil_div(slots_, slots_of_part), 1, [&](int64_t first_part, int64_t last_part) {
      auto source = make_source();
      const int64_t tile = source.tile_slots() * lanes_;
      const Scratch<Key> keys(tile);
      const Scratch<int32_t> places(tile);
      std::vector<Selection<Acc>> best(queries_);
      std::vector<Key> bounds(lanes_, std::numeric_limits<Key>::max());
      std::fill_n(bounds.begin(), queries_, lowest_key());
      const int64_t end = std::min(last_part * slots_of_part, slots_);
      for_each_tile(source, first_part * slots_of_part, end, [&](const Acc* scores, int64_t begin, int64_t last) {
        const int64_t found =
            kernels<Acc>().find_above_bounds(scores, last - begin, lanes_, bounds.data(), keys.get(), places.get());
        for (int64_t i = 0; i < found; ++i) {
          const int64_t place = places.get()[i], q = place % lanes_;
          best[q].add(keys.get()[i], begin + place / lanes_, kept, capacity, bounds[q]);
        }
      });
      for (Selection<Acc>& selection : best) selection.cut(kept);
      const std::lock_guard<std::mutex> lock(mutex_);
      selections.push_back(std::move(best));
    });
    start_parts(1);
    torch::stable::parallel_for(0, queries_, 1, [&](int64_t begin, int64_t end) {
      std::vector<Acc> scores;
      std::vector<int64_t> slots;
      for (int64_t q = begin; q < end; ++q) {
        Selection<Acc> all;
        for (const auto& selection : selections) all.add(selection[q]);
        all.cut(kept);
        all.sort_by_id();
        scores.clear();
        slots.clear();
        for (const auto word : all.words()) {
          scores.push_back(RankedWord<Acc>::score(word));
          slots.push_back(RankedWord<Acc>::id(word));
        }
        draw_from_kept(q, scores.data(), slots.data(), 1, static_cast<int64_t>(slots.size()), 0, draws_[q]);
      }
    });
  }

  const SampleOptions& options_;
  const BlockMask mask_;
  const philox::State state_;
  const int64_t slots_, queries_, lanes_, first_query_;
  int64_t parts_ = 0;
  std::vector<Acc> maximum_, sum_;  // (parts, lanes), see merge_logsumexp()
  std::vector<Draws<Acc>> draws_;   // (queries,)
  std::mutex mutex_;
};

}  // namespace splade_fast::cpu
