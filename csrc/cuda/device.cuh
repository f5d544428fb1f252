// Device code without torch: element types, vector accesses, activations, sequences.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/float_bits.h"
#include "common/integers.h"
#include "common/options.h"

namespace splade_fast::cuda {

// Element types --------------------------------------------------------------------------------------------------

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float to_acc(float value) { return value; }
__device__ inline double to_acc(double value) { return value; }
__device__ inline float to_acc(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_acc(__half value) { return __half2float(value); }

template <typename T>
__device__ inline T from_acc(Accumulator<T> value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return value;
  }
}

// An element that is stored as T or, where in_acc, in the accumulation type of T.
template <typename T>
__device__ inline Accumulator<T> load_either(const void* data, bool in_acc, int64_t index) {
  return in_acc ? static_cast<const Accumulator<T>*>(data)[index] : to_acc(static_cast<const T*>(data)[index]);
}

template <typename T>
__device__ inline void store_either(void* data, bool in_acc, int64_t index, Accumulator<T> value) {
  if (in_acc) {
    static_cast<Accumulator<T>*>(data)[index] = value;
  } else {
    static_cast<T*>(data)[index] = from_acc<T>(value);
  }
}

// Positions within a sequence are stored as uint8, int16 or int32: see position_type().
__device__ inline int32_t load_position(const void* positions, int bytes, int64_t index) {
  if (bytes == 1) return static_cast<const uint8_t*>(positions)[index];
  if (bytes == 2) return static_cast<const int16_t*>(positions)[index];
  return static_cast<const int32_t*>(positions)[index];
}

__device__ inline void store_position(void* positions, int bytes, int64_t index, int32_t position) {
  if (bytes == 1) {
    static_cast<uint8_t*>(positions)[index] = static_cast<uint8_t>(position);
  } else if (bytes == 2) {
    static_cast<int16_t*>(positions)[index] = static_cast<int16_t>(position);
  } else {
    static_cast<int32_t*>(positions)[index] = position;
  }
}

// Vector accesses ------------------------------------------------------------------------------------------------

constexpr int kVectorBytes = 16;  // the widest access of a thread

template <typename T>
constexpr int kMaxVector = kVectorBytes / static_cast<int>(sizeof(T));

// kCount elements that are read and written in one access: the address must be a multiple of the size.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T element[kCount];
};

// An integer of so many bytes, since the compiler may copy a struct element by element.
template <int kBytes>
struct AccessOf;
template <>
struct AccessOf<1> {
  using type = uint8_t;
};
template <>
struct AccessOf<2> {
  using type = uint16_t;
};
template <>
struct AccessOf<4> {
  using type = uint32_t;
};
template <>
struct AccessOf<8> {
  using type = uint2;
};
template <>
struct AccessOf<16> {
  using type = uint4;
};

template <int kCount, typename T>
__device__ inline Vector<T, kCount> load_vector(const T* source) {
  using Access = typename AccessOf<kCount * sizeof(T)>::type;
  return bit_cast<Vector<T, kCount>>(*reinterpret_cast<const Access*>(source));
}

// Into global memory.
template <int kCount, typename T>
__device__ inline void store_vector(T* target, const Vector<T, kCount>& vector) {
  const auto access = bit_cast<typename AccessOf<kCount * sizeof(T)>::type>(vector);
#if defined(__CUDA_ARCH__)
  // The compiler splits some stores of uint4.
  if constexpr (sizeof(access) == 16) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target)), "r"(access.x),
                 "r"(access.y), "r"(access.z), "r"(access.w)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<typename AccessOf<kCount * sizeof(T)>::type*>(target) = access;
}

// The address of a tensor's data in elements, to be or-ed with strides and sizes for dispatch_vector.
inline int64_t address_in_elements(const void* data, int64_t element_bytes) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) / static_cast<uintptr_t>(element_bytes));
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// body(Constant<n>) for the widest access that divides every one of the or-ed addresses, strides and sizes. Vectors of
// two matter: the vocabulary of BERT, 30522, is an odd multiple of two.
template <typename T, typename Body>
void dispatch_vector(int64_t or_of_elements, Body body) {
  if (or_of_elements % kMaxVector<T> == 0) {
    body(Constant<kMaxVector<T>>{});
  } else if (kMaxVector<T> > 2 && or_of_elements % 2 == 0) {
    body(Constant<2>{});
  } else {
    body(Constant<1>{});
  }
}

// Activations ----------------------------------------------------------------------------------------------------

__device__ inline float log1p_of(float value) { return ::log1pf(value); }
__device__ inline double log1p_of(double value) { return ::log1p(value); }

// Keeps NaN, as torch.relu does.
template <typename Acc>
__device__ inline Acc activate(Acc logit, Activation activation) {
  Acc weight = logit <= Acc(0) ? Acc(0) : logit;
  if (activation != Activation::kRelu) weight = log1p_of(weight);
  if (activation == Activation::kLog1pLog1pRelu) weight = log1p_of(weight);
  return weight;
}

// grad * activation'(logit); exactly zero where the logit is not positive, also for an infinite gradient.
template <typename Acc>
__device__ inline Acc coefficient(Acc grad, Acc logit, Activation activation) {
  if (logit <= Acc(0)) return Acc(0);
  Acc slope = Acc(1);
  if (activation != Activation::kRelu) slope = Acc(1) / (Acc(1) + logit);
  if (activation == Activation::kLog1pLog1pRelu) slope = slope / (Acc(1) + log1p_of(logit));
  return grad * slope;
}

// Sequences ------------------------------------------------------------------------------------------------------

// How rows of the flattened input are cut into sequences.
struct Sequences {
  const int32_t* starts;  // cu_seqlens (B + 1,); null: sequence b has the rows [b * length, (b + 1) * length)
  int64_t length;
  int64_t rows;  // of all sequences
};

// Rows [start, stop) of a sequence.
struct Span {
  int64_t start, stop;
};

// The values of cu_seqlens cannot be checked without waiting for the device, so they are kept within the rows.
__device__ inline Span sequence_span(const Sequences& sequences, int64_t b) {
  if (sequences.starts == nullptr) return {b * sequences.length, (b + 1) * sequences.length};
  const auto row = [&](int64_t i) {
    return min(max(static_cast<int64_t>(sequences.starts[i]), int64_t{0}), sequences.rows);
  };
  return {row(b), row(b + 1)};
}

}  // namespace splade_fast::cuda
