// The k best documents of a query, found in any order.
#pragma once

#include "cpu/score/selection.h"

namespace splade_fast::cpu {

// Scores are at least 0. Of equal scores the lower id is better.
template <typename Acc>
class Ranking {
 public:
  using Word = typename RankedWord<Acc>::Word;

  // Documents below `least` are not ranked.
  Ranking(int64_t k, Acc least) : k_(k), least_(least) {}

  void clear() {
    words_.clear();
    threshold_ = least_;
  }

  // A document that scores less is not among the best.
  Acc threshold() const { return threshold_; }
  SortKey<Acc> threshold_key() const { return to_key(threshold_); }

  // Other documents that score at least as much have filled all places.
  void raise_threshold(Acc score) {
    if (to_key(score) > threshold_key()) threshold_ = score;
  }

  void add(Acc score, int32_t id) {
    if (to_key(score) < threshold_key()) return;
    words_.push_back(RankedWord<Acc>::pack(to_key(score), id));
    if (static_cast<int64_t>(words_.size()) >= k_ + k_ / 2 + kSpare) cut();
  }

  // Best first. Nothing can be added afterwards.
  const std::vector<Word>& sort() {
    cut();
    std::sort(words_.begin(), words_.end(), std::greater<>());
    return words_;
  }

 private:
  static constexpr int64_t kSpare = 8;

  // Numbers from 0 on sort as their bits do.
  static SortKey<Acc> to_key(Acc score) {
    SortKey<Acc> key;
    std::memcpy(&key, &score, sizeof(key));
    return key;
  }

  // Keep the k best.
  void cut() {
    if (static_cast<int64_t>(words_.size()) <= k_) return;
    std::nth_element(words_.begin(), words_.begin() + (k_ - 1), words_.end(), std::greater<>());
    words_.resize(k_);
    raise_threshold(RankedWord<Acc>::score(words_.back()));
  }

  int64_t k_;
  Acc least_, threshold_ = least_;
  std::vector<Word> words_;
};

}  // namespace splade_fast::cpu
