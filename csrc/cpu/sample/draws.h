// The best draws of one query, and the logsumexp of its scores from parts.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/sample.h"

namespace splade_fast::cpu {

template <typename Acc>
struct Draw {
  Acc perturbed, score;
  int64_t slot;
};

// The first `size` draws of one query, in a heap whose top is the last of them.
template <typename Acc>
class Draws {
 public:
  explicit Draws(int64_t size) : size_(size) {}

  void add(const Draw<Acc>& draw) {
    if (static_cast<int64_t>(heap_.size()) == size_) {
      if (!is_before(draw, heap_.front())) return;
      std::pop_heap(heap_.begin(), heap_.end(), is_before);
      heap_.back() = draw;
    } else {
      heap_.push_back(draw);
    }
    std::push_heap(heap_.begin(), heap_.end(), is_before);
  }

  void add(const Draws& other) {
    for (const Draw<Acc>& draw : other.heap_) add(draw);
  }

  // Perturbed score below which a draw is not among the first.
  Acc bound() const {
    const bool is_full = static_cast<int64_t>(heap_.size()) == size_;
    return is_full ? heap_.front().perturbed : -std::numeric_limits<Acc>::infinity();
  }

  std::vector<Draw<Acc>> sorted() const {
    std::vector<Draw<Acc>> draws = heap_;
    std::sort(draws.begin(), draws.end(), is_before);
    return draws;
  }

 private:
  static bool is_before(const Draw<Acc>& a, const Draw<Acc>& b) {
    return philox::is_drawn_before(a.perturbed, a.slot, b.perturbed, b.slot);
  }

  int64_t size_;
  std::vector<Draw<Acc>> heap_;
};

// Logsumexp of the scores of a query from its parts, in a fixed order. maximum and sum are (parts, stride) for all
// queries, where sum is that of exp(score - maximum), or of exp(score) if maximum is not finite. Without parts the
// result is -inf.
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

}  // namespace splade_fast::cpu
