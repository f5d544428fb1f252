// The integer threshold of int8 products on the GPU, against the same inequality in exact arithmetic, and the search
// for accumulators above the threshold.
#include <random>

#include "cuda/head/sm90/screen_candidates.h"
#include "cuda/head/sm90/screen_threshold.h"
#include "expect.h"

using namespace splade_fast;
using namespace splade_fast::cuda;

namespace {

#if defined(__SIZEOF_FLOAT128__)
using Exact = __float128;
#else
using Exact = long double;  // as wide on platforms without __float128
#endif

constexpr int kLargestProduct = 127 * 127 * (1 << 16);

// Lower bound of x. screen_inflation() in the norms covers the rounding of the bound itself.
Exact lower(Exact x) { return x - x / (1 << 22); }

Exact bound(const ScreenEntry& entry, const ScreenTile& tile) {
  return Exact(tile.residual) * entry.norm + Exact(tile.norm) * entry.residual + kScreenTiny;
}

Exact scale(const ScreenEntry& entry, const ScreenTile& tile) {
  return Exact(screen_scale(tile.largest)) * entry.scale;
}

// Check that scale * product + bound <= threshold holds for every product up to the integer threshold, and fails for
// nearly every larger product.
void check(const ScreenEntry& entry, const ScreenTile& tile) {
  const int most = integer_threshold(entry, tile);
  const Exact s = scale(entry, tile), e = bound(entry, tile), gap = entry.threshold - e;
  if (most != INT_MIN) {
    const int largest = most < kLargestProduct ? most : kLargestProduct;
    EXPECT(s * largest + lower(e) <= entry.threshold, "threshold %g, scale %g: %d is too much", entry.threshold,
           static_cast<double>(s), most);
  }
  if (most < kLargestProduct && s > 0) {
    const int smallest = most > -kLargestProduct ? most : -kLargestProduct - 1;
    const Exact magnitude = gap < 0 ? -gap : gap, slack = (magnitude + e) / (1 << 19);
    EXPECT(s * (Exact(smallest) + 2) + slack > gap, "threshold %g, scale %g: %d is too little", entry.threshold,
           static_cast<double>(s), most);
  }
}

float drawn(std::mt19937& random, int least_exponent, int exponents) {
  const float fraction = 1.0f + static_cast<float>(random() % (1 << 23)) * 0x1p-23f;
  return std::ldexp(fraction, least_exponent + static_cast<int>(random() % exponents));
}

void test_drawn() {
  std::mt19937 random(1);
  for (int turn = 0; turn < 400000; ++turn) {
    // One turn in four draws from all scales of rounded rows, the others from scales that are close to each other.
    const int least = turn % 4 == 0 ? -46 : -8, exponents = turn % 4 == 0 ? 88 : 8;
    ScreenEntry entry{0, drawn(random, least, exponents), drawn(random, least, exponents),
                      drawn(random, least - 8, exponents)};
    const ScreenTile tile{drawn(random, least, exponents), drawn(random, least, exponents),
                          drawn(random, least - 8, exponents)};
    const float share = static_cast<float>(random() % 4001) / 1000.0f - 2.0f;
    entry.threshold = turn % 3 == 0
                          ? share * static_cast<float>(bound(entry, tile))
                          : share * static_cast<float>(scale(entry, tile) * (Exact(1) + random() % kLargestProduct));
    check(entry, tile);
  }
}

// The gap is a product, or close to one.
void test_ties() {
  std::mt19937 random(2);
  for (int turn = 0; turn < 200000; ++turn) {
    const int product = static_cast<int>(random() % (1 << 24)) - (1 << 23);
    ScreenEntry entry{0, drawn(random, -20, 20), 0, 0};
    ScreenTile tile{kScreenLevels * drawn(random, -20, 20), 0, 0};
    if (turn % 2 == 0) {  // exactly
      entry.scale = std::ldexp(1.0f, static_cast<int>(random() % 20) - 20);
      tile.largest = kScreenLevels;
    }
    entry.threshold = static_cast<float>(scale(entry, tile) * product);
    for (int steps = static_cast<int>(random() % 5); steps > 0; --steps) {
      entry.threshold = std::nextafter(entry.threshold, random() % 2 == 0 ? INFINITY : -INFINITY);
    }
    check(entry, tile);
    const int most = integer_threshold(entry, tile), slack = 2 + std::abs(product) / (1 << 19);
    EXPECT(std::abs(most - product) <= slack, "%d at %d", most, product);
  }
}

void test_what_proves_nothing_or_all() {
  const ScreenTile tile{1, 1, 0.01f};
  const float inf = INFINITY, nan = NAN;
  for (const float residual : {inf, nan}) {
    EXPECT(integer_threshold({100, 1, 1, residual}, tile) == INT_MIN, "of an entry");
    EXPECT(integer_threshold({100, 1, 1, 0.01f}, {1, 1, residual}) == INT_MIN, "of a token");
    EXPECT(integer_threshold({100, 0, 0, 0}, {0, 1, residual}) == INT_MIN, "of a token, with an entry of zeros");
    EXPECT(integer_threshold({inf, 1, 1, residual}, tile) == INT_MIN, "whatever the bias");
  }
  EXPECT(integer_threshold({nan, 1, 1, 0}, tile) == INT_MIN, "a bias that is NaN");
  EXPECT(integer_threshold({-inf, 1, 1, 0}, tile) == INT_MIN, "a bias of inf");
  EXPECT(integer_threshold({inf, 1, 1, 0}, tile) == INT_MAX, "a bias of -inf");
  EXPECT(integer_threshold({1, 0, 1, 0.5f}, tile) == INT_MAX, "zeros below the threshold");
  EXPECT(integer_threshold({0.5f, 0, 1, 0.5f}, tile) == INT_MIN, "zeros above the threshold");
  EXPECT(integer_threshold({0, 0, 0, 0}, {0, 0, 0}) == INT_MIN, "nothing is above zero, nothing proves that");
}

// The smallest logit that is positive in the dense head is above -bias.
void test_thresholds() {
  std::mt19937 random(3);
  for (int turn = 0; turn < 200000; ++turn) {
    const float bias = drawn(random, -30, 60) * (random() % 2 == 0 ? 1 : -1);
    const float mean_dot = turn % 5 == 0 ? -bias : drawn(random, -30, 60) * (random() % 2 == 0 ? 1 : -1);
    const float threshold = screen_threshold(bias, mean_dot);
    const Exact exact = -(Exact(bias) + mean_dot), size = std::fabs(bias) + Exact(std::fabs(mean_dot));
    EXPECT(threshold < exact && threshold > exact - size * 0x1p-20f, "%g for %g and %g", threshold, bias, mean_dot);
  }
  EXPECT(screen_threshold(-INFINITY, 1) == INFINITY && screen_threshold(INFINITY, 1) == -INFINITY, "infinite");
  EXPECT(std::isnan(screen_threshold(NAN, 1)) && std::isnan(screen_threshold(1, NAN)), "NaN");
}

void test_capacity() {
  EXPECT(candidate_capacity(1, 1) == 4096, "of little");
  EXPECT(candidate_capacity(2662, 30522) == int64_t{2662} * 30522 / 512, "of a batch");
  EXPECT(candidate_capacity(int64_t{1} << 30, 250002) > INT32_MAX, "of very much");
}

// An accumulator of a thread is found if it is above the threshold of its entry and its column is below the end.
void test_candidates() {
  using namespace splade_fast::cuda::sm90;
  std::mt19937 random(4);
  for (int turn = 0; turn < 4000; ++turn) {
    const int thread = static_cast<int>(random() % hopper::kWarpgroupThreads);
    const int end = turn % 3 == 0 ? static_cast<int>(random() % (kTileTokens + 1)) : kTileTokens + turn % 2;
    const int threshold[2] = {turn % 5 == 0 ? INT_MAX : static_cast<int>(random() % 9) - 4,
                              turn % 7 == 0 ? INT_MIN : static_cast<int>(random() % 9) - 4};
    int32_t accumulators[kAccumulators];
    for (auto& one : accumulators) one = static_cast<int32_t>(random() % 9) - 4;
    uint32_t words[2][kWords];
    find_above(accumulators, threshold, thread, end, words);
    bool any = false;
    int seen = 0;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < kAccumulators / 2; ++i) {
        const bool found = words[half][i / 32] >> i % 32 & 1;
        int at = -1;  // the accumulator in this row and column
        for (int j = 0; j < kAccumulators; ++j) {
          if (hopper::accumulator_row(thread, j) == hopper::accumulator_row(thread, 2 * half) &&
              hopper::accumulator_column(thread, j) == own_column(thread, i)) {
            at = j;
          }
        }
        EXPECT(at >= 0, "column %d of thread %d", own_column(thread, i), thread);
        const bool above = accumulators[at] > threshold[half];
        EXPECT(found == (above && own_column(thread, i) < end), "thread %d, half %d, %d of %d", thread, half, i, end);
        any |= above;
        seen += own_column(thread, i) < end;
      }
    }
    EXPECT(any_above(accumulators, threshold) == any, "any of thread %d", thread);
    EXPECT(seen == 2 * own_columns_below(thread, end < kTileTokens ? end : kTileTokens),
           "columns of thread %d below %d", thread, end);
  }
}

}  // namespace

int main() {
  test_drawn();
  test_ties();
  test_what_proves_nothing_or_all();
  test_thresholds();
  test_capacity();
  test_candidates();
  return 0;
}
