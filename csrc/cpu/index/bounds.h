// Upper bounds of the scores in a block, from its maxima.
//
// A query weighs the maxima of term t by w[t] = weight[t] * step[t] / 2^exponent, rounded up to float, so that the
// largest lies between 1 and 2. The bound of a block is the sum of w[t] * maximum in float. Of n terms, and with
// u = 2^-24, rounding makes the sum smaller by a factor of at least (1 - u)^(n + 1), and an exact score larger by one
// of at most (1 + u)^(n + 1). The score also grows by at most n times the smallest positive number, where products
// underflow. See docs/search.md.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/index/queries.h"

namespace splade_fast::cpu {

template <typename Acc>
class Bounds {
 public:
  static constexpr int64_t kMaxTerms = 1 << 20;  // the margin below holds for as many terms
  static constexpr int kMaxExponent = 900;       // far from the ends of double

  template <typename T>
  Bounds(const PrunedIndex<T>& index, const QueryTerm<Acc>* terms, int64_t count)
      : weights_(count), margin_(1 + (4.0 * count + 16) * 0x1p-24), underflow_(count * kSmallest) {
    double largest = 0;
    for (int64_t t = 0; t < count; ++t) largest = std::max(largest, product(index, terms[t]));
    std::frexp(largest, &exponent_);
    --exponent_;
    can_prune_ = std::isfinite(largest) && largest > 0 && std::abs(exponent_) <= kMaxExponent && count <= kMaxTerms;
    if (!can_prune_) exponent_ = 0;
    for (int64_t t = 0; t < count; ++t) {
      weights_[t] = can_prune_ ? round_up_to_float(std::ldexp(product(index, terms[t]), -exponent_)) : 1.0f;
    }
  }

  float weight(int64_t term) const { return weights_[term]; }

  // Largest score in a block with this bound.
  Acc score(float bound) const {
    const double score = std::ldexp(bound * margin_, exponent_) + underflow_;
    constexpr Acc kLargest = std::numeric_limits<Acc>::max(), kInfinity = std::numeric_limits<Acc>::infinity();
    if (!can_prune_ || score >= kLargest) return kInfinity;
    const Acc rounded = static_cast<Acc>(score);
    return rounded < score ? std::nextafter(rounded, kInfinity) : rounded;
  }

 private:
  static constexpr double kSmallest = std::numeric_limits<Acc>::denorm_min();

  template <typename T>
  static double product(const PrunedIndex<T>& index, const QueryTerm<Acc>& term) {
    return static_cast<double>(term.weight) * index.step[term.column];
  }

  // The number itself may be smaller than the product that it stands for, by a factor of 1 + 2^-52 or where that
  // underflows.
  static float round_up_to_float(double number) {
    const double above = number * (1 + 0x1p-51);
    float rounded = static_cast<float>(above);
    if (rounded < above) rounded = std::nextafter(rounded, std::numeric_limits<float>::infinity());
    return std::max(rounded, std::numeric_limits<float>::min());  // the processor may take smaller ones for 0
  }

  std::vector<float> weights_;
  double margin_, underflow_;
  int exponent_ = 0;
  bool can_prune_ = false;
};

}  // namespace splade_fast::cpu
