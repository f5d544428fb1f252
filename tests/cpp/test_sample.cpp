// The noise, and the sample kernels of all instruction sets that this machine supports, against loops in double
// precision.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "common/philox.h"
#include "cpu/simd/kernels.h"
#include "expect.h"
#include "instruction_sets.h"

using namespace splade_fast;
using namespace splade_fast::cpu;

static const double kInf = std::numeric_limits<double>::infinity();
static const double kNan = std::numeric_limits<double>::quiet_NaN();

static void expect_words(philox::Words counter, philox::Seed seed, philox::Words expected) {
  const philox::Words found = philox::philox4x32(counter, seed);
  for (int i = 0; i < 4; ++i) {
    EXPECT(found.word[i] == expected.word[i], "word %d: %08x, not %08x", i, found.word[i], expected.word[i]);
  }
}

// The test vectors published with Random123.
static void test_known_answers() {
  constexpr uint32_t kOnes = 0xffffffff;
  expect_words({{0, 0, 0, 0}}, {{0, 0}}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  expect_words({{kOnes, kOnes, kOnes, kOnes}}, {{kOnes, kOnes}}, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  expect_words({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, {{0xa4093822, 0x299f31d0}},
               {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
}

static void test_gumbel() {
  std::mt19937 random(1);
  for (int64_t i = 0; i < 2000000; ++i) {
    // Words of the tail are drawn as often as all others.
    const uint32_t word = random() >> (i % 20), refinement = random();
    const double e =
        word < philox::kRefinedBelow ? (word * 0x1p32 + refinement + 0.5) * 0x1p-64 : (word + 0.5) * 0x1p-32;
    const double exponential = e < 0.5 ? -std::log1p(-e) : -std::log((0x1p32 - word - 0.5) * 0x1p-32);
    const double expected = -std::log(exponential), error = std::abs(philox::gumbel(word, refinement) - expected);
    const double magnitude = std::abs(expected);
    const double allowed = magnitude < 1 ? 3.6 * 0x1p-24 : 2.3 * std::exp2(std::floor(std::log2(magnitude)) - 23);
    EXPECT(error <= allowed, "noise of %08x %08x: error of %g", word, refinement, error);
  }
}

static void test_order() {
  using philox::is_drawn_before;
  EXPECT(is_drawn_before(kNan, 5, kInf, 1) && !is_drawn_before(kInf, 1, kNan, 5), "NaN comes first");
  EXPECT(is_drawn_before(kNan, 1, kNan, 5) && !is_drawn_before(kNan, 5, kNan, 1), "then the lower slot");
  EXPECT(is_drawn_before(2.0, 5, 1.0, 1) && is_drawn_before(2.0, 1, 2.0, 5), "then the larger, the lower slot");
  EXPECT(!is_drawn_before(2.0, 1, 2.0, 1), "nothing comes before itself");
}

// Scores that are found come with their own word, scores that are left out cannot exceed their bound, and the logsumexp
// is that of all scores.
template <typename Acc>
static void test_sample_tile(const Kernels<Acc>& kernel, int64_t count, int64_t lanes, uint64_t first_slot,
                             Acc inv_temp, bool special) {
  std::mt19937 random(static_cast<unsigned>(count * 7 + lanes));
  std::normal_distribution<double> normal(0, 6);
  std::vector<Acc> scores(count * lanes), bounds(lanes), maximum(lanes, static_cast<Acc>(-kInf)), sum(lanes, Acc(0));
  for (Acc& score : scores) {
    const double values[] = {kInf, -kInf, kNan, 3e30, -3e30};
    score = static_cast<Acc>(special && random() % 16 == 0 ? values[random() % 5] : normal(random));
  }
  const philox::State state = philox::unpack_state(-3, (int64_t{5} << 40) + 9);
  const uint64_t first_query = 0xfffffff0;  // numbers of queries have 32 bits and wrap around here
  const auto perturbed = [&](int64_t place) {
    const uint32_t query = static_cast<uint32_t>(first_query + place % lanes);
    const float noise = philox::gumbel_at_slot(state, query, first_slot + place / lanes);
    return philox::perturb(scores[place], inv_temp, noise);
  };
  // A bound lets all scores pass, or few, or it is just below the perturbed score of one of the highest slots.
  for (int64_t q = 0; q < lanes; ++q) {
    bounds[q] = static_cast<Acc>(q % 8 == 0 ? -kInf : q % 8 * 4 - 8);
    if (q % 8 > 3) {
      std::vector<Acc> all;
      for (int64_t n = 0; n < count; ++n) {
        const Acc value = perturbed(n * lanes + q);
        if (std::isfinite(value)) all.push_back(value);
      }
      std::sort(all.begin(), all.end(), std::greater<Acc>());
      if (!all.empty()) {
        bounds[q] = std::nextafter(all[random() % std::min<size_t>(all.size(), 8)], -std::numeric_limits<Acc>::max());
      }
    }
  }
  std::vector<int32_t> places(count * lanes);
  std::vector<uint32_t> words(count * lanes);
  std::vector<char> passes(count * lanes, 0);
  // The second pass continues the logsumexp of the first.
  for (int pass = 0; pass < 2; ++pass) {
    const int64_t found = kernel.sample_tile({scores.data(), count, lanes, state, first_slot, first_query, inv_temp,
                                              bounds.data(), maximum.data(), sum.data(), places.data(), words.data()});
    std::fill(passes.begin(), passes.end(), 0);
    for (int64_t i = 0; i < found; ++i) {
      const int64_t place = places[i];
      const uint64_t slot = first_slot + place / lanes;
      const uint32_t query = static_cast<uint32_t>(first_query + place % lanes);
      EXPECT(!passes[place], "a score is found once");
      passes[place] = 1;
      const uint32_t word =
          philox::block_words(state, static_cast<uint32_t>(slot / 4), query, philox::Domain::kNoise).at_slot(slot);
      EXPECT(words[i] == word, "slot %ld: %08x, not %08x", static_cast<long>(slot), words[i], word);
    }
  }
  int64_t left_out = 0;
  for (int64_t place = 0; place < count * lanes; ++place) {
    if (passes[place]) continue;
    ++left_out;
    EXPECT(perturbed(place) <= bounds[place % lanes], "left out: %g, perturbed %g, is above %g",
           static_cast<double>(scores[place]), static_cast<double>(perturbed(place)),
           static_cast<double>(bounds[place % lanes]));
  }
  EXPECT(special || count < 100 || left_out > count * lanes / 4, "only %ld left out", static_cast<long>(left_out));
  for (int64_t q = 0; q < lanes; ++q) {
    double largest = -kInf, total = 0;
    bool is_finite = true;
    for (int64_t n = 0; n < count; ++n) largest = std::max(largest, static_cast<double>(scores[n * lanes + q]));
    for (int64_t n = 0; n < count; ++n) {
      const double score = scores[n * lanes + q];
      is_finite &= score < kInf;  // neither +inf nor NaN
      total += 2 * std::exp(score - largest);
    }
    if (!is_finite) {
      EXPECT(std::isnan(sum[q]) || sum[q] == Acc(kInf), "inf or NaN shows in the sum, not %g",
             static_cast<double>(sum[q]));
    } else if (largest > -kInf) {
      EXPECT(maximum[q] == static_cast<Acc>(largest), "maximum of query %ld", static_cast<long>(q));
      EXPECT(std::abs(sum[q] - total) <= 1e-6 * total, "sum %.9g, not %.9g", static_cast<double>(sum[q]), total);
    }
  }
}

// Just above a power of two, the product with inv_temp is rounded more coarsely than its sum with the noise. Rounding
// can then lift a perturbed score above a bound that the exact score does not reach. Such a score must be found too.
static void test_rounded_products(const Kernels<float>& kernel) {
  constexpr int64_t kCount = 200, kLanes = 48;
  constexpr float kInvTemp = 2.7f;
  std::mt19937 random(1);
  std::uniform_real_distribution<double> below(-9, 0);
  std::vector<float> scores(kCount * kLanes), bounds(kLanes), maximum(kLanes), sum(kLanes);
  std::vector<int32_t> places(scores.size());
  std::vector<uint32_t> words(scores.size());
  for (int64_t step = 0; step < 100; ++step) {
    for (float& score : scores) score = static_cast<float>((below(random) - 0x1p21) / kInvTemp);
    const philox::State state = philox::unpack_state(1, step);
    const auto perturbed = [&](int64_t place) {
      const uint32_t query = static_cast<uint32_t>(place % kLanes);
      return philox::perturb(scores[place], kInvTemp, philox::gumbel_at_slot(state, query, place / kLanes));
    };
    // The bound is just below the perturbed score of one of the highest slots.
    for (int64_t q = 0; q < kLanes; ++q) {
      std::vector<float> all;
      for (int64_t n = 0; n < kCount; ++n) all.push_back(perturbed(n * kLanes + q));
      std::sort(all.begin(), all.end(), std::greater<float>());
      bounds[q] = std::nextafter(all[random() % 20], -std::numeric_limits<float>::max());
    }
    const int64_t found = kernel.sample_tile({scores.data(), kCount, kLanes, state, 0, 0, kInvTemp, bounds.data(),
                                              maximum.data(), sum.data(), places.data(), words.data()});
    std::vector<char> passes(scores.size(), 0);
    for (int64_t i = 0; i < found; ++i) passes[places[i]] = 1;
    for (int64_t place = 0; place < kCount * kLanes; ++place) {
      EXPECT(passes[place] || perturbed(place) <= bounds[place % kLanes], "lost: perturbed %.9g, bound %.9g",
             static_cast<double>(perturbed(place)), static_cast<double>(bounds[place % kLanes]));
    }
  }
}

template <typename Acc>
static void test_group_maximum(const Kernels<Acc>& kernel) {
  constexpr int64_t kLanes = 16, kSlots = 50;
  std::mt19937 random(3);
  std::vector<Acc> scores(kSlots * kLanes), value(kLanes, static_cast<Acc>(-kInf));
  std::vector<Position<Acc>> position(kLanes, 0);
  for (Acc& score : scores) score = static_cast<Acc>(random() % 40 == 0 ? kNan : static_cast<int>(random() % 9));
  kernel.group_maximum(scores.data(), 7, 20, kLanes, value.data(), position.data());
  kernel.group_maximum(scores.data() + 20 * kLanes, 27, kSlots - 20, kLanes, value.data(), position.data());
  for (int64_t q = 0; q < kLanes; ++q) {
    int64_t best = 0;
    for (int64_t n = 1; n < kSlots; ++n) {
      const double score = scores[n * kLanes + q], so_far = scores[best * kLanes + q];
      if (philox::is_drawn_before(score, n, so_far, best)) best = n;
    }
    EXPECT(position[q] == best + 7, "NaN, the highest, the lowest slot: %ld, not %ld", static_cast<long>(position[q]),
           static_cast<long>(best + 7));
  }
}

// Products of small integers, which are exact.
static void test_multiply_slots(const Kernels<float>& kernel, int64_t slots, int64_t dim) {
  const int64_t tile = kernel.tile_tokens, columns = kernel.panel_columns, lanes = 2 * columns;
  const int64_t tile_bytes = kernel.packed_bytes(tile, dim), panel_bytes = kernel.packed_bytes(columns, dim);
  std::mt19937 random(5);
  std::vector<float> rows(slots * dim), queries(lanes * dim), scores(slots * lanes);
  for (float& x : rows) x = static_cast<float>(static_cast<int>(random() % 7) - 3);
  for (float& x : queries) x = static_cast<float>(static_cast<int>(random() % 7) - 3);
  // The byte after the last tile shows whether packing writes too much.
  std::vector<char> packed_slots((slots + tile - 1) / tile * tile_bytes + 64, 77), packed_queries(2 * panel_bytes + 64);
  for (int64_t n = slots - 1; n >= 0; --n) {
    if (n % tile != 0) continue;
    kernel.pack(packed_slots.data() + n / tile * tile_bytes, tile, rows.data() + n * dim, dim, nullptr,
                std::min(tile, slots - n), dim);
  }
  EXPECT(packed_slots[packed_slots.size() - 64] == 77, "packing writes beyond its tile");
  for (int panel = 0; panel < 2; ++panel) {
    kernel.pack(packed_queries.data() + panel * panel_bytes, columns, queries.data() + panel * columns * dim, dim,
                nullptr, columns, dim);
  }
  kernel.multiply_slots({packed_slots.data(), packed_queries.data(), dim, slots, lanes, 0.5f, scores.data(),
                         rows.data(), static_cast<int64_t>(rows.size() * sizeof(float))});
  for (int64_t n = 0; n < slots; ++n) {
    for (int64_t q = 0; q < lanes; ++q) {
      double product = 0;
      for (int64_t d = 0; d < dim; ++d) product += rows[n * dim + d] * queries[q * dim + d];
      EXPECT(scores[n * lanes + q] == 0.5 * product, "slot %ld, query %ld", static_cast<long>(n), static_cast<long>(q));
    }
  }
}

template <typename Acc>
static void test_type(const Kernels<Acc>& kernel) {
  for (const int64_t count : {1, 3, 32, 200}) {
    for (const uint64_t first_slot : {uint64_t{0}, uint64_t{5}, (uint64_t{1} << 34) - 203}) {
      for (const Acc inv_temp : {Acc(0), Acc(1), Acc(2.5)}) {
        for (const bool special : {false, true}) {
          test_sample_tile<Acc>(kernel, count, 48, first_slot, inv_temp, special);
        }
      }
    }
  }
  test_group_maximum<Acc>(kernel);
}

static void test_all(const AllKernels& kernels) {
  test_type(kernels.f32);
  test_type(kernels.f64);
  test_rounded_products(kernels.f32);
  for (const int64_t slots : {1, 14, 29}) {
    for (const int64_t dim : {1, 16, 31, 64}) test_multiply_slots(kernels.f32, slots, dim);
  }
}

int main() {
  test_known_answers();
  test_gumbel();
  test_order();
  for_each_instruction_set(test_all);
  return 0;
}
