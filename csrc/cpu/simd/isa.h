// Vectors of the width that the compiler targets, and functions on them. The files that are compiled once for each
// instruction set include this file; the vector extensions of GCC and Clang yield the instructions of the set.
//
// The file uses only fundamental types, <cstdint>, <cstring> and <cmath>. Of an inline function that several files
// share, the linker keeps one copy, which must not be one that was compiled for AVX-512 and fails on older machines.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/simd/dtypes.h"

namespace splade_fast::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename Acc>
struct VectorOf;

template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
  typedef mask columns;
};

template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
  typedef int32_t columns __attribute__((vector_size(kVectorBytes / 2)));
};

template <typename Acc>
using Vec = typename VectorOf<Acc>::type;
template <typename Acc>
using Mask = typename VectorOf<Acc>::mask;  // also the vector type of positions and sort keys
template <typename Acc>
using Columns = typename VectorOf<Acc>::columns;  // as many numbers of columns as a vector has lanes
template <typename Acc>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Acc));

template <typename V>
inline V load_bits(const void* source) {
  V value;
  std::memcpy(&value, source, sizeof(V));
  return value;
}

template <typename V>
inline void store_bits(void* target, V value) {
  std::memcpy(target, &value, sizeof(V));
}

// Return an integer whose bit i says whether lane i of the mask is set.
template <typename Acc>
inline unsigned lane_bits(Mask<Acc> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == 4) return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
  if constexpr (sizeof(Acc) == 8) return _mm512_movepi64_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  if constexpr (sizeof(Acc) == 4) return static_cast<unsigned>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
  if constexpr (sizeof(Acc) == 8) return static_cast<unsigned>(_mm256_movemask_pd(reinterpret_cast<__m256d>(mask)));
#elif defined(__SSE2__)
  if constexpr (sizeof(Acc) == 4) return static_cast<unsigned>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
  if constexpr (sizeof(Acc) == 8) return static_cast<unsigned>(_mm_movemask_pd(reinterpret_cast<__m128d>(mask)));
#else
  unsigned bits = 0;
  for (int i = 0; i < kLanes<Acc>; ++i) bits |= static_cast<unsigned>(mask[i] & 1) << i;
  return bits;
#endif
}

// Scalars -------------------------------------------------------------------------------------------------------

inline float to_acc(float value) { return value; }
inline double to_acc(double value) { return value; }
inline float to_acc(float16 value) { return static_cast<float>(value); }
inline float to_acc(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  return load_bits<float>(&bits);
}

// Vectors of kLanes<Acc> elements of a storage type T -----------------------------------------------------------

inline Vec<float> load_vec(const float* source) { return load_bits<Vec<float>>(source); }
inline Vec<double> load_vec(const double* source) { return load_bits<Vec<double>>(source); }

inline Vec<float> load_vec(const bfloat16* source) {
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
  const Wide bits = __builtin_convertvector(load_bits<Narrow>(source), Wide) << 16;
  return reinterpret_cast<Vec<float>>(bits);
}

inline Vec<float> load_vec(const float16* source) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))));
#elif defined(__F16C__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
#else
  Vec<float> value;
  for (int i = 0; i < kLanes<float>; ++i) value[i] = static_cast<float>(source[i]);
  return value;
#endif
}

inline void store_vec(float* target, Vec<float> value) { store_bits(target, value); }
inline void store_vec(double* target, Vec<double> value) { store_bits(target, value); }

inline void store_vec(bfloat16* target, Vec<float> value) {
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
  const Wide bits = reinterpret_cast<Wide>(value);
  const Wide rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
  const Wide quiet_nan = (bits >> 16) | 0x40;
  store_bits(target, __builtin_convertvector(value == value ? rounded : quiet_nan, Narrow));
}

inline void store_vec(float16* target, Vec<float> value) {
#if defined(__AVX512F__)
  const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT);
  store_bits(target, bits);
#elif defined(__F16C__)
  store_bits(target, _mm256_cvtps_ph(reinterpret_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) target[i] = static_cast<float16>(value[i]);
#endif
}

// Load and store the end of a row, which is shorter than a vector. The lanes past `count` are zero.
template <typename T>
inline Vec<Accumulator<T>> load_partial(const T* source, int64_t count) {
  T padded[kLanes<Accumulator<T>>] = {};
  std::memcpy(padded, source, count * sizeof(T));
  return load_vec(padded);
}

template <typename T>
inline void store_partial(T* target, Vec<Accumulator<T>> value, int64_t count) {
  T padded[kLanes<Accumulator<T>>];
  store_vec(padded, value);
  std::memcpy(target, padded, count * sizeof(T));
}

// Shuffles ------------------------------------------------------------------------------------------------------

// One step of the transposition of a square. In rows i and i + kHalf, it swaps the halves of each 2 * kHalf lanes that
// are on the wrong side of the diagonal.
template <int kHalf, typename V>
inline void swap_halves(V& upper, V& lower) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(upper[0]));
  typedef std::conditional_t<sizeof(upper[0]) == 8, int64_t, int32_t> Index;
  typedef Index Indices __attribute__((vector_size(kVectorBytes)));
  Indices first = {}, second = {};  // lanes of upper start at 0, those of lower at kCount
  for (int i = 0; i < kCount; ++i) {
    first[i] = i & kHalf ? kCount + i - kHalf : i;
    second[i] = i & kHalf ? kCount + i : i + kHalf;
  }
#if defined(__clang__)
  V new_upper, new_lower;
  for (int i = 0; i < kCount; ++i) {
    new_upper[i] = first[i] < kCount ? upper[first[i]] : lower[first[i] - kCount];
    new_lower[i] = second[i] < kCount ? upper[second[i]] : lower[second[i] - kCount];
  }
#else
  const V new_upper = __builtin_shuffle(upper, lower, first), new_lower = __builtin_shuffle(upper, lower, second);
#endif
  upper = new_upper;
  lower = new_lower;
}

template <int kHalf, typename V, int kRows>
inline void transpose_step(V (&rows)[kRows]) {
  for (int i = 0; i < kRows; ++i) {
    if (!(i & kHalf)) swap_halves<kHalf>(rows[i], rows[i + kHalf]);
  }
  if constexpr (kHalf > 1) transpose_step<kHalf / 2>(rows);
}

// Swap rows[i][j] and rows[j][i].
template <typename V, int kRows>
inline void transpose(V (&rows)[kRows]) {
  if constexpr (kRows > 1) transpose_step<kRows / 2>(rows);
}

// Move the lanes that are set in `bits` to the front, in order. The lanes after them have any value.
#if defined(__AVX512F__)
constexpr bool kCanCompress = true;

inline Vec<float> compress(Vec<float> x, unsigned bits) {
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), reinterpret_cast<__m512>(x)));
}
inline Vec<double> compress(Vec<double> x, unsigned bits) {
  return reinterpret_cast<Vec<double>>(
      _mm512_maskz_compress_pd(static_cast<__mmask8>(bits), reinterpret_cast<__m512d>(x)));
}
inline Columns<float> compress(Columns<float> x, unsigned bits) {
  return reinterpret_cast<Columns<float>>(
      _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), reinterpret_cast<__m512i>(x)));
}
inline Columns<double> compress(Columns<double> x, unsigned bits) {
  return reinterpret_cast<Columns<double>>(
      _mm256_maskz_compress_epi32(static_cast<__mmask8>(bits), reinterpret_cast<__m256i>(x)));
}
#elif defined(__AVX2__)
constexpr bool kCanCompress = true;

// The lanes that each set of bits moves to the front. A byte for each keeps the table in 2 KiB of the first-level
// cache.
struct CompressTable {
  alignas(8) uint8_t lanes[256][8] = {};
  constexpr CompressTable() {
    for (int bits = 0; bits < 256; ++bits) {
      for (int lane = 0, kept = 0; lane < 8; ++lane) {
        if (bits >> lane & 1) lanes[bits][kept++] = static_cast<uint8_t>(lane);
      }
    }
  }
};
constexpr CompressTable kCompressTable;

inline __m256i kept_lanes(unsigned bits) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompressTable.lanes[bits])));
}

inline Vec<float> compress(Vec<float> x, unsigned bits) {
  return reinterpret_cast<Vec<float>>(_mm256_permutevar8x32_ps(reinterpret_cast<__m256>(x), kept_lanes(bits)));
}
inline Columns<float> compress(Columns<float> x, unsigned bits) {
  return reinterpret_cast<Columns<float>>(_mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(x), kept_lanes(bits)));
}
// A lane of 64 bits is two of 32 bits.
inline Vec<double> compress(Vec<double> x, unsigned bits) {
  constexpr uint8_t kTwice[16] = {0, 3, 12, 15, 48, 51, 60, 63, 192, 195, 204, 207, 240, 243, 252, 255};
  return reinterpret_cast<Vec<double>>(compress(reinterpret_cast<Vec<float>>(x), kTwice[bits]));
}
inline Columns<double> compress(Columns<double> x, unsigned bits) {
  return reinterpret_cast<Columns<double>>(
      _mm_permutevar_ps(reinterpret_cast<__m128>(x), _mm256_castsi256_si128(kept_lanes(bits))));
}
#else
constexpr bool kCanCompress = false;
#endif

// Math ----------------------------------------------------------------------------------------------------------

// A vector whose lanes are all equal. Subtracting 0 changes no number, so that the compiler leaves it out; adding 0
// would change -0.
template <typename V, typename S>
inline V broadcast(S value) {
  return value - V{};
}

// relu that keeps NaN, as torch.relu does
template <typename Acc>
inline Vec<Acc> relu(Vec<Acc> x) {
  return x < 0 ? Vec<Acc>{} : x;
}

// log(1 + x) for x >= 0, inf or NaN, within 2 ulp. With u = 1 + x = 2^k m and m in [sqrt(1/2), sqrt(2)), the series of
// log(m) = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172, is exact to 1e-9 when taken to s^9. The term
// (x - (u - 1)) / u corrects the rounding of u to first order.
inline Vec<float> log1p_vec(Vec<float> x) {
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  const Vec<float> one = broadcast<Vec<float>>(1.0f);
  const Vec<float> u = one + x;
  const Bits kSqrtHalf = broadcast<Bits>(0x3f3504f3u);
  const Bits shifted = reinterpret_cast<Bits>(u) + (0x3f800000u - kSqrtHalf);
  const Mask<float> exponent = reinterpret_cast<Mask<float>>(shifted >> 23) - 127;
  const Vec<float> m = reinterpret_cast<Vec<float>>((shifted & 0x007fffffu) + kSqrtHalf);
  const Vec<float> k = __builtin_convertvector(exponent, Vec<float>);
  // The smaller summand is the one that lost bits.
  const Vec<float> lost = exponent >= 1 ? one - (u - x) : x - (u - one);
  const Vec<float> f = m - one;
  const Vec<float> s = f / (m + one);
  const Vec<float> z = s * s;
  const Vec<float> series = z * (1.0f / 3 + z * (1.0f / 5 + z * (1.0f / 7 + z * (1.0f / 9))));
  const float ln2_high = 0x1.62e4p-1f;  // few enough bits that k * ln2_high is exact
  const float ln2_low = 0x1.7f7d1cp-20f;
  // 2s = f - s f, so that the large term f stays exact.
  const Vec<float> log_m = f - (s * f - (2.0f * s * series + (k * ln2_low + lost / u)));
  const Vec<float> result = k * ln2_high + log_m;
  return x < __builtin_inff() ? result : x;  // inf and NaN stay
}

inline Vec<double> log1p_vec(Vec<double> x) {
  Vec<double> result;
  for (int i = 0; i < kLanes<double>; ++i) result[i] = std::log1p(x[i]);
  return result;
}

// exp(x) for x <= 0, +inf or NaN: within 1.2 ulp down to -87, and 0 below. With x = k log(2) + r, the series of exp(r)
// is taken to r^7.
inline Vec<float> exp_vec(Vec<float> x) {
  const float magic = 0x1.8p23f;  // a number added to it is rounded to an integer, which stands in the lowest bits
  const Vec<float> shifted = x * 0x1.715476p0f + magic;
  const Vec<float> k = shifted - magic;
  const float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  const Vec<float> r = (x - k * ln2_high) - k * ln2_low;
  Vec<float> series = 1.0f / 720 + r * (1.0f / 5040);
  series = 1.0f / 24 + r * (1.0f / 120 + r * series);
  series = 1 + r * (1 + r * (0.5f + r * (1.0f / 6 + r * series)));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  const Bits scale = (reinterpret_cast<Bits>(shifted) << 23) + 0x3f800000u;
  const Vec<float> result = series * reinterpret_cast<Vec<float>>(scale);
  return x < -87 ? Vec<float>{} : (x <= 0 ? result : x);
}

inline Vec<double> exp_vec(Vec<double> x) {
  Vec<double> result;
  for (int i = 0; i < kLanes<double>; ++i) result[i] = std::exp(x[i]);
  return result;
}

// Whether x replaces the maximum so far. NaN replaces every number and is kept, as in torch.max, and ties keep the
// earlier position.
template <typename Acc>
inline Mask<Acc> beats(Vec<Acc> x, Vec<Acc> maximum) {
  return ~(x <= maximum) & (maximum == maximum);
}

// Whether any lane of a mask is set.
template <typename M>
inline bool has_set_lane(M mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#else
  const Mask<double> words = reinterpret_cast<Mask<double>>(mask);
  int64_t any = 0;
  for (int i = 0; i < kLanes<double>; ++i) any |= words[i];
  return any != 0;
#endif
}

}  // namespace
}  // namespace splade_fast::cpu
