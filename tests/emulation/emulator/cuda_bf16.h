// What csrc/cuda uses of cuda_bf16.h.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(bits));
  return result;
}

// To the nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Two at a time.
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline unsigned __hgt2_mask(__nv_bfloat162 a, __nv_bfloat162 b) {
  const bool x = __bfloat162float(a.x) > __bfloat162float(b.x), y = __bfloat162float(a.y) > __bfloat162float(b.y);
  return (x ? 0xffffu : 0) | (y ? 0xffff0000u : 0);
}

inline __nv_bfloat16 __hmax_nan(__nv_bfloat16 a, __nv_bfloat16 b) {
  const float x = __bfloat162float(a), y = __bfloat162float(b);
  return x != x || y != y ? __nv_bfloat16{0x7fff} : x > y ? a : b;
}

inline __nv_bfloat162 __hmax2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {__hmax_nan(a.x, b.x), __hmax_nan(a.y, b.y)};
}
