// Kernels of sample, on a tile of scores (slots, lanes) with a lane for each query.
//
// Noise is computed only for slots that it can lift to the draws so far. Since -log(-log1p(-e)) <= -log(e), a slot is
// not drawn unless e <= exp(inv_temp * score - bound). A chord of 2^t bounds that exponential from above in a few
// instructions, and the few slots that pass get the noise with its logarithms.
#pragma once

#include <limits>

#include "common/philox.h"
#include "cpu/simd/isa.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/product_impl.h"

namespace splade_fast::cpu {
namespace {

// Multiply packed tiles of slots, in the place of tokens, by packed panels of queries, in the place of the weight.
template <typename T>
void multiply_slots(const ProductTask<Accumulator<T>>& task) {
  using Acc = Accumulator<T>;
  const int64_t num_steps = steps<T>(task.dim);
  const int64_t tile_bytes = packed_bytes<T>(kTileTokens, task.dim);
  const int64_t panel_bytes = packed_bytes<T>(kPanelColumns<Acc>, task.dim);
  const Vec<Acc> scale = broadcast<Vec<Acc>>(task.scale);
  const char* tile = static_cast<const char*>(task.slots);
  const int64_t panels = task.lanes / kPanelColumns<Acc>;
  const int64_t parts = (task.count + kTileTokens - 1) / kTileTokens * panels * (num_steps / kPart + 1);
  int64_t part = 0;
  Vec<Acc> products[kTileTokens][kPanelVectors];
  for (int64_t first = 0; first < task.count; first += kTileTokens, tile += tile_bytes) {
    const int64_t rows = task.count - first < kTileTokens ? task.count - first : kTileTokens;
    const char* panel = static_cast<const char*>(task.queries);
    for (int64_t lane = 0; lane < task.lanes; lane += kPanelColumns<Acc>, panel += panel_bytes) {
      // Each part prefetches a little, because many requests at once would delay the loads of the product.
      multiply_tile<T>(tile, panel, num_steps, products,
                       [&] { prefetch_share(task.next, task.next_bytes, part++, parts); });
      for (int64_t r = 0; r < rows; ++r) {
        Acc* row = task.scores + (first + r) * task.lanes + lane;
        for (int j = 0; j < kPanelVectors; ++j) store_bits(row + j * kLanes<Acc>, products[r][j] * scale);
      }
    }
  }
}

// Philox for kLanes<float> queries, the even ones in one vector of 64-bit lanes and the odd ones in another. Only the
// lower halves of the lanes are used: the products ignore the upper halves.
typedef uint64_t Wide __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words32 __attribute__((vector_size(kVectorBytes)));

inline Wide multiply_lower(Wide a, Wide b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Wide>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return reinterpret_cast<Wide>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// Keys of the Philox rounds, and the words of the counter that all queries and slots share.
struct RoundKeys {
  uint64_t key[philox::kRounds][2];
  uint64_t step_low, last_word;

  explicit RoundKeys(const philox::State& state) : step_low(state.step_low), last_word((state.step_high & 0x3fffffff)) {
    uint32_t key0 = state.seed.word[0], key1 = state.seed.word[1];
    for (int round = 0; round < philox::kRounds; ++round, key0 += philox::kWeyl0, key1 += philox::kWeyl1) {
      key[round][0] = key0;
      key[round][1] = key1;
    }
  }
};

inline void philox_rounds(const RoundKeys& keys, uint64_t block, Wide queries, Wide (&x)[4]) {
  const Wide multiplier0 = broadcast<Wide>(uint64_t{philox::kMultiplier0});
  const Wide multiplier1 = broadcast<Wide>(uint64_t{philox::kMultiplier1});
  x[0] = broadcast<Wide>(block);
  x[1] = queries;
  x[2] = broadcast<Wide>(keys.step_low);
  x[3] = broadcast<Wide>(keys.last_word);
  for (int round = 0; round < philox::kRounds; ++round) {
    const Wide product0 = multiply_lower(x[0], multiplier0), product1 = multiply_lower(x[2], multiplier1);
    x[0] = (product1 >> 32) ^ x[1] ^ keys.key[round][0];
    x[1] = product1;
    x[2] = (product0 >> 32) ^ x[3] ^ keys.key[round][1];
    x[3] = product0;
  }
}

// Words of the four slots of a block for kLanes<float> queries.
inline void block_words(const RoundKeys& keys, uint64_t block, uint64_t first_query, Words32 (&words)[4]) {
  Wide even, odd, even_words[4], odd_words[4];
  for (int i = 0; i < kLanes<double>; ++i) even[i] = first_query + 2 * i;
  odd = even + 1;
  philox_rounds(keys, block, even, even_words);
  philox_rounds(keys, block, odd, odd_words);
  for (int j = 0; j < 4; ++j) {
    words[j] = reinterpret_cast<Words32>((even_words[j] & 0xffffffff) | (odd_words[j] << 32));
  }
}

// Number of vectors that hold kLanes<float> values of Acc: one of floats, or two of doubles.
template <typename Acc>
constexpr int kParts = kLanes<float> / kLanes<Acc>;

template <typename Acc>
inline Vec<float> narrow(const Vec<Acc> (&parts)[kParts<Acc>]) {
  if constexpr (kParts<Acc> == 1) {
    return parts[0];
  } else {
    Vec<float> result;
    for (int i = 0; i < kLanes<float>; ++i) result[i] = static_cast<float>(parts[i / kLanes<Acc>][i % kLanes<Acc>]);
    return result;
  }
}

// Lanes where the noise of a word may reach -gap. The slack covers the rounding error, which is at most 45 * 2^-22. NaN
// passes.
inline Mask<float> may_be_drawn(Vec<float> gap, Words32 words) {
  constexpr float kLog2E = 0x1.715476p0f, kWordBits = 24, kSlack = 0x1p-10f, kLimit = 100;
  const Vec<float> exponent = gap * kLog2E + (kWordBits + kSlack);
  const Vec<float> below = exponent < kLimit ? exponent : broadcast<Vec<float>>(kLimit);
  const Vec<float> inside = below > -kLimit ? below : broadcast<Vec<float>>(-kLimit);
  // The integer x * 2^23, read as the bits of a float, is 2^floor(x) with the fraction of x as mantissa: the chord.
  const Mask<float> bits = __builtin_convertvector((inside + 127) * 0x1p23f, Mask<float>);
  const Vec<float> upper = __builtin_convertvector(reinterpret_cast<Mask<float>>(words >> 8), Vec<float>);
  return upper <= reinterpret_cast<Vec<float>>(bits);
}

// Maximum of a logsumexp as a number that may be subtracted from the scores.
template <typename Acc>
inline Vec<Acc> finite_or_zero(Vec<Acc> maximum) {
  return maximum - maximum == 0 ? maximum : Vec<Acc>{};
}

template <typename Acc>
inline void add_to_logsumexp(const SampleTile<Acc>& tile, int64_t lane) {
  const Vec<Acc> before = load_bits<Vec<Acc>>(tile.maximum + lane);
  Vec<Acc> maximum = before, sum = {};
  const Acc* scores = tile.scores + lane;
  for (int64_t n = 0; n < tile.count; ++n) {
    const Vec<Acc> score = load_bits<Vec<Acc>>(scores + n * tile.lanes);
    maximum = score > maximum ? score : maximum;
  }
  const Vec<Acc> reference = finite_or_zero<Acc>(maximum);
  for (int64_t n = 0; n < tile.count; ++n) sum += exp_vec(load_bits<Vec<Acc>>(scores + n * tile.lanes) - reference);
  const Vec<Acc> step = finite_or_zero<Acc>(before) - reference;
  const Vec<Acc> kept = load_bits<Vec<Acc>>(tile.sum + lane) * exp_vec(step < 0 ? step : Vec<Acc>{});
  store_bits(tile.sum + lane, kept + sum);
  store_bits(tile.maximum + lane, maximum);
}

// The bound, lowered by an ulp. The compiler may contract inv_temp * score - bound, which then lacks a rounding of the
// product that could have raised it by half an ulp.
template <typename Acc>
inline Vec<Acc> relax_bound(Vec<Acc> bound) {
  constexpr Acc kUlp = std::numeric_limits<Acc>::epsilon();
  return bound < 0 ? bound * (1 + kUlp) : bound * (1 - kUlp);
}

template <typename Acc>
int64_t sample_tile(const SampleTile<Acc>& tile) {
  const RoundKeys keys(tile.state);
  const Vec<Acc> inv_temp = broadcast<Vec<Acc>>(tile.inv_temp);
  const uint64_t end = tile.first_slot + tile.count;
  int64_t found = 0;
  for (int64_t lane = 0; lane < tile.lanes; lane += kLanes<float>) {
    Vec<Acc> bound[kParts<Acc>];
    for (int p = 0; p < kParts<Acc>; ++p) {
      add_to_logsumexp(tile, lane + p * kLanes<Acc>);
      bound[p] = relax_bound<Acc>(load_bits<Vec<Acc>>(tile.bounds + lane + p * kLanes<Acc>));
    }
    for (uint64_t slot = tile.first_slot; slot < end;) {
      const uint64_t block = slot / philox::kSlotsPerBlock;
      Words32 words[philox::kSlotsPerBlock];
      block_words(keys, block, tile.first_query + lane, words);
      const uint64_t next = (block + 1) * philox::kSlotsPerBlock;
      for (const uint64_t stop = next < end ? next : end; slot < stop; ++slot) {
        const int64_t place = static_cast<int64_t>(slot - tile.first_slot) * tile.lanes + lane;
        Vec<Acc> gap[kParts<Acc>];
        for (int p = 0; p < kParts<Acc>; ++p) {
          gap[p] = load_bits<Vec<Acc>>(tile.scores + place + p * kLanes<Acc>) * inv_temp - bound[p];
        }
        const Words32 at_slot = words[slot % philox::kSlotsPerBlock];
        const Mask<float> passes = may_be_drawn(narrow<Acc>(gap), at_slot);
        if (!has_set_lane(passes)) continue;
        for (int i = 0; i < kLanes<float>; ++i) {
          if (!passes[i]) continue;
          tile.places[found] = static_cast<int32_t>(place + i);
          tile.words[found++] = at_slot[i];
        }
      }
    }
  }
  return found;
}

// Slots are in ascending order; beats() defines the order of the scores.
template <typename Acc>
void group_maximum(const Acc* scores, int64_t first, int64_t count, int64_t lanes, Acc* value,
                   Position<Acc>* position) {
  for (int64_t lane = 0; lane < lanes; lane += kLanes<Acc>) {
    Vec<Acc> best = load_bits<Vec<Acc>>(value + lane);
    Mask<Acc> where = load_bits<Mask<Acc>>(position + lane);
    for (int64_t n = 0; n < count; ++n) {
      const Vec<Acc> score = load_bits<Vec<Acc>>(scores + n * lanes + lane);
      const Mask<Acc> better = beats<Acc>(score, best);
      best = better ? score : best;
      where = better ? broadcast<Mask<Acc>>(static_cast<Position<Acc>>(first + n)) : where;
    }
    store_bits(value + lane, best);
    store_bits(position + lane, where);
  }
}

}  // namespace
}  // namespace splade_fast::cpu
