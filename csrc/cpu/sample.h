// Draws from tiles of scores (slots, lanes), a lane per query of a block, whatever computes them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <utility>
#include <vector>

#include "common/sample.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/ranking.h"
#include "cpu/simd/kernels.h"

namespace splade_fast::cpu {

template <typename Acc>
struct Draw {
  Acc perturbed, score;
  int64_t slot;
};

// The first few draws of one query, in a heap with the last of them on top.
template <typename Acc>
class Draws {
 public:
  explicit Draws(int64_t size) : size_(size) {}

  void add(const Draw<Acc>& draw) {
    if (static_cast<int64_t>(heap_.size()) == size_) {
      if (!before(draw, heap_.front())) return;
      std::pop_heap(heap_.begin(), heap_.end(), before);
      heap_.back() = draw;
    } else {
      heap_.push_back(draw);
    }
    std::push_heap(heap_.begin(), heap_.end(), before);
  }

  void add(const Draws& other) {
    for (const Draw<Acc>& draw : other.heap_) add(draw);
  }

  // What a perturbed score has to reach.
  Acc bound() const {
    const bool full = static_cast<int64_t>(heap_.size()) == size_;
    return full ? heap_.front().perturbed : -std::numeric_limits<Acc>::infinity();
  }

  std::vector<Draw<Acc>> in_order() const {
    std::vector<Draw<Acc>> draws = heap_;
    std::sort(draws.begin(), draws.end(), before);
    return draws;
  }

 private:
  static bool before(const Draw<Acc>& a, const Draw<Acc>& b) {
    return philox::is_drawn_before(a.perturbed, a.slot, b.perturbed, b.slot);
  }

  int64_t size_;
  std::vector<Draw<Acc>> heap_;
};

// Sums of exp(score - maximum) of parts of a query's scores, (parts, stride) of all queries; the order of the parts is
// fixed. Of no slots there are no parts.
template <typename Acc>
Acc merge_logsumexp(const std::vector<Acc>& maximum, const std::vector<Acc>& sum, int64_t query, int64_t parts,
                    int64_t stride) {
  const auto reference = [&](int64_t at) {
    return std::isfinite(maximum[at]) ? static_cast<double>(maximum[at]) : 0.0;
  };
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const int64_t end = query + parts * stride;
  double largest = -kInf, total = 0;
  for (int64_t at = query; at < end; at += stride) {
    if (sum[at] != 0) largest = std::max(largest, reference(at));
  }
  if (largest == -kInf) return static_cast<Acc>(largest);
  for (int64_t at = query; at < end; at += stride) {
    if (sum[at] != 0) total += scaled_sum(sum[at], reference(at) - largest);
  }
  return static_cast<Acc>(largest + std::log(total));
}

// Sets to -inf what a block's queries must neither count nor draw.
class BlockMask {
 public:
  BlockMask(const SampleMasks& masks, int64_t slots, int64_t first_query, int64_t queries)
      : slots_(slots), queries_(queries) {
    if (masks.valid) {
      per_query_ = masks.valid->dim() == 2;
      valid_ = const_data<bool>(*masks.valid) + (per_query_ ? first_query * slots : 0);
    }
    if (!masks.exclude) return;
    if (masks.exclude->scalar_type() == ScalarType::Bool) {
      exclude_ = const_data<bool>(*masks.exclude) + first_query * slots;
      return;
    }
    const int64_t width = masks.exclude->size(1);
    const int64_t* listed = const_data<int64_t>(*masks.exclude) + first_query * width;
    for (int64_t i = 0; i < queries * width; ++i) {
      if (listed[i] >= 0 && listed[i] < slots) excluded_.push_back({listed[i], i / width});
    }
    std::sort(excluded_.begin(), excluded_.end());
  }

  bool none_valid(int64_t begin, int64_t end) const {
    return valid_ && !per_query_ && std::none_of(valid_ + begin, valid_ + end, [](bool valid) { return valid; });
  }

  template <typename Acc>
  void apply(Acc* scores, int64_t lanes, int64_t begin, int64_t end) const {
    constexpr Acc kOut = -std::numeric_limits<Acc>::infinity();
    if (valid_ && !per_query_) {
      for (int64_t n = begin; n < end; ++n) {
        if (!valid_[n]) std::fill_n(scores + (n - begin) * lanes, lanes, kOut);
      }
    }
    for (const bool* mask : {per_query_ ? valid_ : nullptr, exclude_}) {
      if (!mask) continue;
      for (int64_t q = 0; q < queries_; ++q) {
        for (int64_t n = begin; n < end; ++n) {
          if (mask[q * slots_ + n] == (mask == exclude_)) scores[(n - begin) * lanes + q] = kOut;
        }
      }
    }
    const auto first = std::lower_bound(excluded_.begin(), excluded_.end(), Excluded{begin, 0});
    for (auto pair = first; pair != excluded_.end() && pair->first < end; ++pair) {
      scores[(pair->first - begin) * lanes + pair->second] = kOut;
    }
  }

 private:
  using Excluded = std::pair<int64_t, int64_t>;  // slot, query

  int64_t slots_, queries_;
  const bool *valid_ = nullptr, *exclude_ = nullptr;
  bool per_query_ = false;
  std::vector<Excluded> excluded_;
};

// One block of queries against all slots. make_source() gives a thread its own source of scores, with
//   int64_t tile_slots()                  how many slots it likes to score at once, a multiple of 4
//   Acc* scores(int64_t begin, int64_t end)  scaled scores (end - begin, lanes); nullptr: stop, something is refused
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
    const int64_t wanted = options_.num_samples;
    for (int64_t q = 0; q < queries_; ++q) {
      const std::vector<Draw<Acc>> draws = draws_[q].in_order();
      const int64_t row = (first + q) * wanted;
      Acc* scores = mutable_data<Acc>(samples.scores) + row;
      Acc* perturbed = mutable_data<Acc>(samples.perturbed) + row;
      int64_t* indices = mutable_data<int64_t>(samples.indices) + row;
      std::fill_n(scores, wanted, -kInf);
      std::fill_n(perturbed, wanted, -kInf);
      std::fill_n(indices, wanted, int64_t{-1});
      for (size_t i = 0; i < draws.size(); ++i) {
        scores[i] = draws[i].score;
        perturbed[i] = draws[i].perturbed;
        indices[i] = draws[i].slot;
      }
      mutable_data<Acc>(samples.logsumexp)[first + q] = merge_logsumexp(maximum_, sum_, q, parts_, lanes_);
    }
  }

 private:
  using Key = Position<Acc>;
  static constexpr Acc kInf = std::numeric_limits<Acc>::infinity();
  static constexpr float kAboveNoise = 46;
  // Slots of a part: its sums are added up in one go whatever the number of threads. The parts are bounded in number
  // too, so that they take no memory to speak of.
  static constexpr int64_t kMinPart = 1024, kMaxParts = 256;

  static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

  int64_t part_slots(int64_t tile) const {
    return divide_up(std::max(kMinPart, divide_up(slots_, kMaxParts)), tile) * tile;
  }

  void start_parts(int64_t parts) {
    parts_ = parts;
    maximum_.assign(parts * lanes_, -kInf);
    sum_.assign(parts * lanes_, Acc(0));
  }

  // body(source, draws, part) for each part, by threads with draws of their own, which are added up at the end.
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

  // body(scores, begin, end) for each tile of [begin, end) that has anything valid.
  template <typename Source, typename Body>
  void for_each_tile(Source& source, int64_t begin, int64_t end, const Body& body) const {
    for (int64_t n = begin; n < end; n += source.tile_slots()) {
      const int64_t last = std::min(n + source.tile_slots(), end);
      if (mask_.none_valid(n, last)) continue;
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

  // A product with inv_temp may have left the range of the type: that is out like a score of -inf.
  static void add_drawable(Acc perturbed, Acc score, int64_t slot, Draws<Acc>& draws) {
    if (perturbed != -kInf) draws.add({perturbed, score, slot});
  }

  template <typename MakeSource>
  void draw_from_all(const MakeSource& make_source) {
    const int64_t slots_of_part = part_slots(make_source().tile_slots());
    start_parts(divide_up(slots_, slots_of_part));
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

  // The logsumexp and draws of a query's kept scores, which are `stride` apart, as one part.
  void draw_from_kept(int64_t q, const Acc* scores, const int64_t* slots, int64_t stride, int64_t count, int64_t part,
                      Draws<Acc>& draws) {
    Acc maximum = -kInf;
    for (int64_t i = 0; i < count; ++i) maximum = scores[i * stride] > maximum ? scores[i * stride] : maximum;
    const Acc reference = std::isfinite(maximum) ? maximum : Acc(0);
    constexpr int64_t kRun = 64;  // summing by runs rounds less
    double sum = 0;
    for (int64_t first = 0; first < count; first += kRun) {
      double of_run = 0;
      for (int64_t i = first; i < std::min(first + kRun, count); ++i)
        of_run += std::exp(scores[i * stride] - reference);
      sum += of_run;
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

  // Maxima of neighbouring groups (groups, lanes) and their slots.
  struct GroupMaxima {
    int64_t lanes;
    std::vector<Acc> score;
    std::vector<Key> position;  // within the slots that are reduced together
    std::vector<int64_t> slot;

    GroupMaxima(int64_t groups, int64_t lanes)
        : lanes(lanes), score(groups * lanes, -kInf), position(groups * lanes, 0), slot(groups * lanes) {}
  };

  // Slots [begin, end), which are the groups from first_group on or a piece of it.
  template <typename Source>
  void reduce_groups(Source& source, int64_t begin, int64_t end, int64_t first_group, int64_t groups,
                     GroupMaxima& maxima) const {
    std::fill(maxima.score.begin(), maxima.score.end(), -kInf);
    std::fill(maxima.position.begin(), maxima.position.end(), Key(0));
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
    const int64_t largest = divide_up(slots_, groups), slots_of_part = part_slots(make_source().tile_slots());
    if (largest > slots_of_part) {
      draw_from_large_groups(make_source, groups, divide_up(largest, slots_of_part));
      return;
    }
    const int64_t groups_of_part = slots_of_part / largest;
    start_parts(divide_up(groups, groups_of_part));
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

  // Each group in pieces, so that there is work for all threads.
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

  // The key of -inf in the order of to_keys() of score_impl.h: only what is above it can be drawn.
  static Key lowest_key() {
    const Acc lowest = -kInf;
    Key bits;
    std::memcpy(&bits, &lowest, sizeof(bits));
    return bits ^ std::numeric_limits<Key>::max();
  }

  template <typename MakeSource>
  void draw_from_highest(const MakeSource& make_source, int64_t kept) {
    STD_TORCH_CHECK(slots_ <= INT32_MAX, "the exact top_k must be of at most ", INT32_MAX, " slots, got ", slots_);
    const int64_t slots_of_part = part_slots(make_source().tile_slots());
    const int64_t capacity = kept + std::max(kept, kMinCandidates);
    std::vector<std::vector<Selection<Acc>>> selections;
    torch::stable::parallel_for(0, divide_up(slots_, slots_of_part), 1, [&](int64_t first_part, int64_t last_part) {
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
            kernels<Acc>().find_candidates(scores, last - begin, lanes_, bounds.data(), keys.get(), places.get());
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
        for (const auto& of_thread : selections) all.add(of_thread[q]);
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
  std::vector<Acc> maximum_, sum_;  // (parts, lanes) of the logsumexp
  std::vector<Draws<Acc>> draws_;   // of each query
  std::mutex mutex_;
};

}  // namespace splade_fast::cpu
