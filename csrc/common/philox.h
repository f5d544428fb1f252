// The random generator Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011) and Gumbel noise from its words. Every
// device and splade_fast/reference/sample.py give the same bits.
//
// The counter is (slot / 4, query, step, domain). A block of four words thus serves four neighbouring slots of a query,
// and the noise does not depend on how the slots are cut into tiles, threads or shards.
#pragma once

#include <cstdint>
#include <limits>

#include "common/float_bits.h"

namespace splade_fast::philox {

constexpr int kRounds = 10;
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

constexpr int64_t kSlotsPerBlock = 4;
constexpr int64_t kMaxSlots = int64_t{1} << 34, kMaxQueries = int64_t{1} << 32;  // range of the counter

// Small words give the largest noise. Those below kRefinedBelow get 32 more bits, a word of the second domain.
constexpr uint32_t kRefinedBelow = 1 << 16;

enum class Domain : uint32_t { kNoise = 0, kRefinement = 1 };

struct Words {
  uint32_t word[4];

  // Selections instead of word[slot % 4], because a variable index puts the words of a GPU thread into memory.
  SPLADE_FAST_INLINE uint32_t at_slot(uint64_t slot) const {
    const uint32_t even = slot & 2 ? word[2] : word[0], odd = slot & 2 ? word[3] : word[1];
    return slot & 1 ? odd : even;
  }
};

// The key of the cipher.
struct Seed {
  uint32_t word[2];
};

struct State {
  Seed seed;
  uint32_t step_low, step_high;

  SPLADE_FAST_INLINE uint32_t last_word(Domain domain) const {
    return (step_high & 0x3fffffff) | static_cast<uint32_t>(domain) << 30;
  }
};

SPLADE_FAST_INLINE State unpack_state(int64_t seed, int64_t step) {
  const uint64_t seed_bits = static_cast<uint64_t>(seed), step_bits = static_cast<uint64_t>(step);
  return {{{static_cast<uint32_t>(seed_bits), static_cast<uint32_t>(seed_bits >> 32)}},
          static_cast<uint32_t>(step_bits),
          static_cast<uint32_t>(step_bits >> 32)};
}

SPLADE_FAST_INLINE Words philox4x32(Words counter, Seed seed) {
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kMultiplier0) * counter.word[0];
    const uint64_t product1 = static_cast<uint64_t>(kMultiplier1) * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ seed.word[0], static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ seed.word[1],
                static_cast<uint32_t>(product0)}};
    seed.word[0] += kWeyl0;
    seed.word[1] += kWeyl1;
  }
  return counter;
}

// The words of slots 4 * block … 4 * block + 3.
SPLADE_FAST_INLINE Words block_words(const State& state, uint32_t block, uint32_t query, Domain domain) {
  return philox4x32({{block, query, state.step_low, state.last_word(domain)}}, state.seed);
}

// Each operation rounds once and is never contracted. Host code that calls them must be compiled with
// -ffp-contract=off.
#if defined(__CUDA_ARCH__)
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float subtract(float a, float b) { return __fsub_rn(a, b); }
__device__ inline float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline double add(double a, double b) { return __dadd_rn(a, b); }
__device__ inline double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ inline float rounded(uint64_t integer) { return __ull2float_rn(integer); }
#else
SPLADE_FAST_INLINE float add(float a, float b) { return a + b; }
SPLADE_FAST_INLINE float subtract(float a, float b) { return a - b; }
SPLADE_FAST_INLINE float multiply(float a, float b) { return a * b; }
SPLADE_FAST_INLINE float divide(float a, float b) { return a / b; }
SPLADE_FAST_INLINE double add(double a, double b) { return a + b; }
SPLADE_FAST_INLINE double multiply(double a, double b) { return a * b; }
SPLADE_FAST_INLINE float rounded(uint64_t integer) { return static_cast<float>(integer); }
#endif

// The number 2^exponent * (1 + fraction), where 1 + fraction lies between sqrt(1/2) and sqrt(2).
struct Split {
  float fraction, exponent;
};

SPLADE_FAST_INLINE Split split(float x) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3;
  const uint32_t shifted = to_bits(x) + (0x3f800000 - kSqrtHalf);
  return {subtract(from_bits((shifted & 0x007fffff) + kSqrtHalf), 1.0f),
          static_cast<float>(static_cast<int32_t>(shifted >> 23) - 127)};
}

// Natural logarithm. The series of log(1 + f) = 2 atanh(s), with s = f / (2 + f) and |s| < 0.172, is taken to s^9.
// 2s = f - s f keeps the large term f exact, and kHigh has so few bits that exponent * kHigh is exact.
SPLADE_FAST_INLINE float log_from_split(Split x) {
  constexpr float kHigh = 0x1.62e4p-1f, kLow = 0x1.7f7d1cp-20f;
  const float s = divide(x.fraction, add(2.0f, x.fraction));
  const float z = multiply(s, s);
  float series = add(1.0f / 7, multiply(z, 1.0f / 9));
  series = add(1.0f / 5, multiply(z, series));
  series = multiply(z, add(1.0f / 3, multiply(z, series)));
  const float rest = add(multiply(multiply(2.0f, s), series), multiply(x.exponent, kLow));
  return add(multiply(x.exponent, kHigh), subtract(x.fraction, subtract(multiply(s, x.fraction), rest)));
}

// Gumbel noise G = -log(-log1p(-e)) with e = (word + 1/2) / 2^32, or (word 2^32 + refinement + 1/2) / 2^64 for a small
// word. The error, measured over 8 million words, is at most 2.3 ulp where |G| >= 1 and at most 3.6 * 2^-24 elsewhere.
// G lies between -3.14 and 45.1.
SPLADE_FAST_INLINE float gumbel(uint32_t word, uint32_t refinement) {
  const uint64_t odd = 2 * static_cast<uint64_t>(word) + 1;
  float e = multiply(rounded(odd), 0x1p-33f);
  if (word < kRefinedBelow) {
    e = multiply(rounded(((odd - 1) << 32) | (2 * static_cast<uint64_t>(refinement) + 1)), 0x1p-65f);
  }
  // log1p(-e) is the logarithm of 1 - e, which is rounded from the word itself where it is not close to 1.
  const Split rest =
      word < (1u << 30) ? Split{-e, 0.0f} : split(multiply(rounded((uint64_t{1} << 33) - odd), 0x1p-33f));
  return -log_from_split(split(-log_from_split(rest)));
}

// The noise of a slot, from the word of that slot.
SPLADE_FAST_INLINE float gumbel_from_word(const State& state, uint32_t word, uint32_t query, uint64_t slot) {
  uint32_t refinement = 0;
  if (word < kRefinedBelow) {
    refinement =
        block_words(state, static_cast<uint32_t>(slot / kSlotsPerBlock), query, Domain::kRefinement).at_slot(slot);
  }
  return gumbel(word, refinement);
}

SPLADE_FAST_INLINE float gumbel_at_slot(const State& state, uint32_t query, uint64_t slot) {
  const Words words = block_words(state, static_cast<uint32_t>(slot / kSlotsPerBlock), query, Domain::kNoise);
  return gumbel_from_word(state, words.at_slot(slot), query, slot);
}

// Order of the draws: NaN comes first, then the larger perturbed score, and among equal ones the lower slot.
template <typename Acc>
SPLADE_FAST_INLINE bool is_drawn_before(Acc perturbed, int64_t slot, Acc other, int64_t other_slot) {
  const bool is_nan = perturbed != perturbed, is_other_nan = other != other;
  if (is_nan != is_other_nan) return is_nan;
  if (!is_nan && perturbed != other) return perturbed > other;
  return slot < other_slot;
}

// inv_temp * score + noise, rounded twice. A score of -inf stays -inf, so that its slot is never drawn; inv_temp = 0
// draws uniformly.
template <typename Acc>
SPLADE_FAST_INLINE Acc perturb(Acc score, Acc inv_temp, float noise) {
  if (score == -std::numeric_limits<Acc>::infinity()) return score;
  return add(inv_temp == 0 && score == score ? Acc(0) : multiply(inv_temp, score), static_cast<Acc>(noise));
}

}  // namespace splade_fast::philox
