// What csrc/cuda uses of cuda_fp16.h.
#pragma once

struct __half {
  _Float16 value;
};

inline float __half2float(__half x) { return static_cast<float>(x.value); }

inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

// Two at a time.
struct __half2 {
  __half x, y;
};

inline unsigned __hgt2_mask(__half2 a, __half2 b) {
  return (a.x.value > b.x.value ? 0xffffu : 0) | (a.y.value > b.y.value ? 0xffff0000u : 0);
}

inline __half __hmax_nan(__half a, __half b) {
  return a.value != a.value ? a : b.value != b.value || !(a.value > b.value) ? b : a;
}

inline __half2 __hmax2_nan(__half2 a, __half2 b) { return {__hmax_nan(a.x, b.x), __hmax_nan(a.y, b.y)}; }
