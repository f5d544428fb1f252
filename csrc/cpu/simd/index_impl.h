// Kernels of the pruned index, see index.h.
#pragma once

#include "cpu/simd/index.h"
#include "cpu/simd/isa.h"

namespace splade_fast::cpu {
namespace {

inline Vec<float> load_bytes(const uint8_t* source) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(
      _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)))));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(
      _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)))));
#else
  typedef uint8_t Narrow __attribute__((vector_size(kLanes<float>)));
  return __builtin_convertvector(__builtin_convertvector(load_bits<Narrow>(source), Mask<float>), Vec<float>);
#endif
}

bool add_bounds(const TermEntries& entries, float weight, int64_t groups, float* bounds, int32_t* entry) {
  const Vec<float> weights = broadcast<Vec<float>>(weight);
  for (int64_t i = entries.begin; i < entries.end; ++i) {
    const uint64_t group = static_cast<uint64_t>(entries.group[i] - entries.first_group);
    if (group >= static_cast<uint64_t>(groups)) return false;
    entry[group] = static_cast<int32_t>(i);
    float* const target = bounds + group * kGroupBlocks;
    const uint8_t* const maximum = entries.maximum + i * kGroupBlocks;
    for (int j = 0; j < kGroupBlocks; j += kLanes<float>) {
      store_bits(target + j, load_bits<Vec<float>>(target + j) + weights * load_bytes(maximum + j));
    }
  }
  return true;
}

void group_bounds(const float* bounds, int64_t groups, float* largest) {
  for (int64_t g = 0; g < groups; ++g, bounds += kGroupBlocks) {
    Vec<float> most = load_bits<Vec<float>>(bounds);
    for (int j = kLanes<float>; j < kGroupBlocks; j += kLanes<float>) {
      const Vec<float> other = load_bits<Vec<float>>(bounds + j);
      most = most < other ? other : most;
    }
    float result = most[0];
    for (int lane = 1; lane < kLanes<float>; ++lane) result = result < most[lane] ? most[lane] : result;
    largest[g] = result;
  }
}

int64_t find_bounds(const float* bounds, int64_t count, float least, float limit, int32_t* found) {
  int64_t number = 0;
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    const Vec<float> bound = load_bits<Vec<float>>(bounds + i);
    const Mask<float> inside = (bound >= least) & (bound < limit);
    for (unsigned bits = lane_bits<float>(inside); bits; bits &= bits - 1) {
      found[number++] = static_cast<int32_t>(i + __builtin_ctz(bits));
    }
  }
  while (number > 0 && found[number - 1] >= count) --number;
  return number;
}

// Find the postings of a query in a group, and fetch them from memory together: the branches that follow cannot be
// predicted, and would wait for the postings of one term after another. Return the number of terms that have any, or -1
// if a posting is out of range.
template <typename T, typename Acc>
inline int64_t fetch_postings(const PostingsQuery<T, Acc>& query, int64_t group) {
  FoundPostings<Acc>* const found = query.postings_of_term;
  int64_t count = 0;
  for (int64_t t = 0; t < query.terms; ++t) {
    const int64_t entry = query.entry[t * query.groups + group];
    found[count] = {entry, 0, query.weight[t]};
    if (entry < 0) continue;
    __builtin_prefetch(query.postings.start + entry);
    ++count;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = query.postings.start[found[i].start], end = query.postings.start[found[i].start + 1];
    if (start < 0 || start > end || end > query.postings.count) return -1;
    __builtin_prefetch(query.postings.document + start);
    __builtin_prefetch(query.postings.value + start);
    found[i].start = start;
    found[i].end = end;
  }
  return count;
}

// Put the first lanes of a vector to the lanes that are set in `bits`, in order, and zero to the others.
#if defined(__AVX512F__)
template <typename Acc>
constexpr bool kCanExpand = true;

inline Vec<float> expand(Vec<float> packed, unsigned bits) {
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), reinterpret_cast<__m512>(packed)));
}
inline Vec<double> expand(Vec<double> packed, unsigned bits) {
  return reinterpret_cast<Vec<double>>(
      _mm512_maskz_expand_pd(static_cast<__mmask8>(bits), reinterpret_cast<__m512d>(packed)));
}
#elif defined(__AVX2__)
template <typename Acc>
constexpr bool kCanExpand = std::is_same_v<Acc, float>;

// Lane of the packed vector for each lane of the expanded one. For a lane that is not set the number does not matter.
struct ExpandTable {
  alignas(32) int32_t lanes[256][8] = {};
  constexpr ExpandTable() {
    for (int bits = 0; bits < 256; ++bits) {
      for (int lane = 0, packed = 0; lane < 8; packed += bits >> lane++ & 1) lanes[bits][lane] = packed;
    }
  }
};
constexpr ExpandTable kExpandTable;

inline Vec<float> expand(Vec<float> packed, unsigned bits) {
  const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kExpandTable.lanes[bits]));
  const Mask<float> lane_bit = {1, 2, 4, 8, 16, 32, 64, 128};
  const Mask<float> is_set = (lane_bit & static_cast<int32_t>(bits)) != 0;
  const __m256 expanded = _mm256_permutevar8x32_ps(reinterpret_cast<__m256>(packed), lanes);
  return is_set ? reinterpret_cast<Vec<float>>(expanded) : Vec<float>{};
}
#else
template <typename Acc>
constexpr bool kCanExpand = false;
#endif

// Load kLanes<Acc> values as Acc.
template <typename Acc, typename T>
inline Vec<Acc> load_as(const T* source) {
  if constexpr (std::is_same_v<Acc, Accumulator<T>>) {
    return load_vec(source);
  } else {
    Vec<Acc> values;
    for (int i = 0; i < kLanes<Acc>; ++i) values[i] = static_cast<Acc>(to_acc(source[i]));
    return values;
  }
}

// Add weight * value for the documents of a bitmap. `readable` values may be read, of which those of the bitmap are the
// first.
template <typename T, typename Acc>
inline void add_bitmap(const uint8_t* bitmap, const T* value, int64_t readable, Acc weight, Acc* scores) {
  if constexpr (kCanExpand<Acc>) {
    const Vec<Acc> weights = broadcast<Vec<Acc>>(weight);
    const T* const end = value + readable;
    for (int64_t first = 0; first < kGroupDocuments; first += kLanes<Acc>) {
      unsigned bits = bitmap[first / 8];
      if constexpr (kLanes<Acc> == 16) bits |= static_cast<unsigned>(bitmap[first / 8 + 1]) << 8;
      T padded[kLanes<Acc>] = {};
      const T* source = value;
      if (end - value < kLanes<Acc>) {
        std::memcpy(padded, value, (end - value) * sizeof(T));
        source = padded;
      }
      const Vec<Acc> sum = load_bits<Vec<Acc>>(scores + first);
      store_bits(scores + first, sum + expand(load_as<Acc>(source), bits) * weights);
      value += __builtin_popcount(bits);
    }
  } else {
    for (int64_t first = 0; first < kGroupDocuments; first += 8) {
      for (unsigned bits = bitmap[first / 8]; bits; bits &= bits - 1) {
        scores[first + __builtin_ctz(bits)] += static_cast<Acc>(to_acc(*value++)) * weight;
      }
    }
  }
}

// Add weight * value for the postings [start, end) of an entry to the scores of its group.
template <typename T, typename Acc>
inline bool add_entry(const Postings<T>& postings, int64_t start, int64_t end, Acc weight, Acc* scores) {
  const int64_t count = end - start;
  const uint8_t* const document = postings.document + start;
  const T* const value = postings.value + start;
  if (count < kBitmapBytes) {
    for (int64_t i = 0; i < count; ++i) scores[document[i]] += static_cast<Acc>(to_acc(value[i])) * weight;
    return true;
  }
  int64_t bits = 0;
  for (int64_t i = 0; i < kBitmapBytes; i += 8) bits += __builtin_popcountll(load_bits<uint64_t>(document + i));
  if (bits != count) return false;
  add_bitmap(document, value, postings.count - start, weight, scores);
  return true;
}

template <typename T, typename Acc>
bool score_group(const PostingsQuery<T, Acc>& query, int64_t group) {
  for (int64_t i = 0; i < kGroupDocuments; ++i) query.scores[i] = 0;
  const int64_t terms = fetch_postings(query, group);
  for (int64_t t = 0; t < terms; ++t) {
    const FoundPostings<Acc> found = query.postings_of_term[t];
    if (!add_entry(query.postings, found.start, found.end, found.weight, query.scores)) return false;
  }
  return terms >= 0;
}

template <typename T, typename Acc>
int64_t add_term(const Postings<T>& postings, const TermEntries& entries, Acc weight, int64_t groups, Acc* scores) {
  for (int64_t i = entries.begin; i < entries.end; ++i) {
    const int64_t group = entries.group[i] - entries.first_group;
    if (group >= groups) return i;
    const int64_t start = postings.start[i], end = postings.start[i + 1];
    const bool is_inside = group >= 0 && 0 <= start && start <= end && end <= postings.count;
    if (!is_inside || !add_entry(postings, start, end, weight, scores + group * kGroupDocuments)) return -1;
  }
  return entries.end;
}

template <typename Acc>
int64_t find_scores(const Acc* scores, SortKey<Acc> least, int32_t* found) {
  int64_t number = 0;
  for (int64_t i = 0; i < kGroupDocuments; i += kLanes<Acc>) {
    const Mask<Acc> above = load_bits<Mask<Acc>>(scores + i) >= least;  // numbers from 0 on sort as their bits do
    if (!has_set_lane(above)) continue;
    for (int lane = 0; lane < kLanes<Acc>; ++lane) {
      if (above[lane]) found[number++] = static_cast<int32_t>(i + lane);
    }
  }
  return number;
}

template <typename T, typename Acc>
constexpr PostingsKernels<T, Acc> make_postings() {
  return {score_group<T, Acc>, add_term<T, Acc>, find_scores<Acc>};
}

constexpr IndexKernels make_index(const char*) {
  return {add_bounds,
          group_bounds,
          find_bounds,
          make_postings<float, float>(),
          make_postings<bfloat16, float>(),
          make_postings<float16, float>(),
          make_postings<double, double>(),
          make_postings<float, double>(),
          make_postings<bfloat16, double>(),
          make_postings<float16, double>()};
}

}  // namespace
}  // namespace splade_fast::cpu
