// Vectors of whatever width the compiler targets. Each kernels_<isa>.cpp is compiled for one instruction set and
// includes this; GCC's and Clang's vector extensions turn it into that set's instructions.
//
// Only fundamental types and <cstdint>/<cstring>/<cmath> here: a shared inline function compiled for AVX-512 must
// not be the copy that the linker keeps for older machines.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dtypes.h"

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
};

template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
};

template <typename Acc>
using Vec = typename VectorOf<Acc>::type;
template <typename Acc>
using Mask = typename VectorOf<Acc>::mask;  // also the vector of positions that rides beside a maximum
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

// Scalars -------------------------------------------------------------------------------------------------------

inline float to_acc(float value) { return value; }
inline double to_acc(double value) { return value; }
inline float to_acc(float16 value) { return static_cast<float>(value); }
inline float to_acc(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  return load_bits<float>(&bits);
}

template <typename T>
inline T from_acc(Accumulator<T> value) {
  if constexpr (sizeof(T) == 2 && !IsFloat16<T>::value) {
    uint32_t bits = load_bits<uint32_t>(&value);
    if (value != value) return bfloat16{static_cast<uint16_t>((bits >> 16) | 0x40)};  // keep NaN a NaN
    bits += 0x7fff + ((bits >> 16) & 1);                                              // round to nearest even
    return bfloat16{static_cast<uint16_t>(bits >> 16)};
  } else {
    return static_cast<T>(value);
  }
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
  return reinterpret_cast<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))));
#elif defined(__F16C__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
#else
  Vec<float> value;
  for (int i = 0; i < kLanes<float>; ++i) value[i] = static_cast<float>(source[i]);
  return value;
#endif
}

template <typename T>
inline void store_vec(T* target, Vec<Accumulator<T>> value) {
  if constexpr (sizeof(T) >= 4) {
    store_bits(target, value);
  } else {
    for (int i = 0; i < kLanes<float>; ++i) target[i] = from_acc<T>(value[i]);
  }
}

// The first `count` lanes only, the others zero: the ragged end of a row.
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

// Math ----------------------------------------------------------------------------------------------------------

template <typename V, typename S>
inline V broadcast(S value) {
  return V{} + value;
}

// relu that keeps NaN, as torch.relu does.
template <typename Acc>
inline Vec<Acc> relu(Vec<Acc> x) {
  return x < 0 ? Vec<Acc>{} : x;
}

// log(1 + x) for x >= 0, inf or NaN; within 2 ulp. u = 1 + x = 2^k m with m in [sqrt(1/2), sqrt(2)), and
// log(m) = 2 atanh(s) with s = (m - 1) / (m + 1), |s| < 0.172, whose series to s^9 is exact to 1e-9. What rounding
// took from u comes back as the first-order term (x - (u - 1)) / u.
inline Vec<float> log1p_vec(Vec<float> x) {
  typedef Mask<float> Int;
  const Vec<float> one = broadcast<Vec<float>>(1.0f);
  const Vec<float> u = one + x;
  const Int kSqrtHalf = broadcast<Int>(0x3f3504f3);
  const Int shifted = reinterpret_cast<Int>(u) + (0x3f800000 - kSqrtHalf);
  const Int exponent = (shifted >> 23) - 127;
  const Vec<float> m = reinterpret_cast<Vec<float>>((shifted & 0x007fffff) + kSqrtHalf);
  const Vec<float> k = __builtin_convertvector(exponent, Vec<float>);
  // The smaller summand is the one that was rounded.
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
  return x < __builtin_inff() ? result : x;  // inf and NaN pass
}

inline Vec<double> log1p_vec(Vec<double> x) {
  Vec<double> result;
  for (int i = 0; i < kLanes<double>; ++i) result[i] = std::log1p(x[i]);
  return result;
}

}  // namespace
}  // namespace splade_fast::cpu
