// Selection of the k best scores, with their ids, from a stream of scores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/simd/dtypes.h"

namespace splade_fast::cpu {

constexpr int64_t kMinSpare = 256;  // smallest room of a selection beyond the k best

// Sort key and id in one integer: larger is better, and of equal keys the lower id is better.
template <typename Acc>
struct RankedWord {
  using Key = SortKey<Acc>;
  using Word = std::conditional_t<sizeof(Acc) == 8, unsigned __int128, uint64_t>;
  using Half = std::make_unsigned_t<Key>;
  static constexpr int kBits = 8 * sizeof(Key);
  static constexpr Half kSign = Half(1) << (kBits - 1);

  static Word pack(Key key, int64_t id) {
    return static_cast<Word>(static_cast<Half>(key) ^ kSign) << kBits | static_cast<Half>(~static_cast<Half>(id));
  }
  static Key key(Word word) { return static_cast<Key>(static_cast<Half>(word >> kBits) ^ kSign); }
  static int64_t id(Word word) { return static_cast<int64_t>(static_cast<Half>(~static_cast<Half>(word))); }

  // Inverse of to_keys() in score_impl.h.
  static Acc score(Word word) {
    constexpr Key kTop = std::numeric_limits<Key>::max();
    const Key value = key(word);
    if (value == kTop) return std::numeric_limits<Acc>::quiet_NaN();
    const Key bits = value < 0 ? value ^ kTop : value;
    Acc result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
  }
};

// The k best documents of one query so far, in a buffer that is cut back to k whenever it is full.
template <typename Acc>
class Selection {
 public:
  using Word = typename RankedWord<Acc>::Word;
  using Key = SortKey<Acc>;

  // Documents come in ascending order of ids, so a document whose key equals the bound loses the tie.
  void add(Key key, int64_t id, int64_t k, int64_t capacity, Key& bound) {
    if (key <= bound) return;
    words_.push_back(RankedWord<Acc>::pack(key, id));
    if (static_cast<int64_t>(words_.size()) < capacity) return;
    cut(k);
    bound = RankedWord<Acc>::key(words_[k - 1]);
  }

  // Keep the k best, and put the worst of them last.
  void cut(int64_t k) {
    if (static_cast<int64_t>(words_.size()) <= k) return;
    std::nth_element(words_.begin(), words_.begin() + (k - 1), words_.end(), std::greater<Word>());
    words_.resize(k);
  }

  void add(const Selection& other) { words_.insert(words_.end(), other.words_.begin(), other.words_.end()); }

  void sort_by_id() {
    std::sort(words_.begin(), words_.end(),
              [](Word a, Word b) { return RankedWord<Acc>::id(a) < RankedWord<Acc>::id(b); });
  }

  const std::vector<Word>& words() const { return words_; }

 private:
  std::vector<Word> words_;
};

}  // namespace splade_fast::cpu
