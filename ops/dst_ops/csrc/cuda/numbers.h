// Element types: float, __nv_bfloat16, __half. A pack is 16 bytes: 4 or 8 numbers.
#pragma once

#include "platform.h"

namespace dst_ops {

template <typename T>
constexpr int pack_size = 16 / sizeof(T);

template <int Bytes>
struct WordOf;
template <>
struct WordOf<4> { using type = uint32_t; };
template <>
struct WordOf<8> { using type = uint2; };

__device__ __forceinline__ float wide(float v) { return v; }
__device__ __forceinline__ float wide(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float wide(__half v) { return __half2float(v); }

__device__ __forceinline__ void narrow(float v, float& to) { to = v; }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }
__device__ __forceinline__ void narrow(float v, __half& to) { to = __float2half_rn(v); }

// Two neighbours in a register, the first in the low half.
__device__ __forceinline__ uint32_t pair(float a, float b, __nv_bfloat16) {
  union { __nv_bfloat162 h; uint32_t u; } p;
  p.h = __floats2bfloat162_rn(a, b);
  return p.u;
}
__device__ __forceinline__ uint32_t pair(float a, float b, __half) {
  union { __half2 h; uint32_t u; } p;
  p.h = __floats2half2_rn(a, b);
  return p.u;
}

__device__ __forceinline__ void unpair(uint32_t u, float* to, __nv_bfloat16) {
  to[0] = __uint_as_float(u << 16);
  to[1] = __uint_as_float(u & 0xffff0000u);
}
__device__ __forceinline__ void unpair(uint32_t u, float* to, __half) {
  union { uint32_t u; __half2 h; } p;
  p.u = u;
  const float2 f = __half22float2(p.h);
  to[0] = f.x;
  to[1] = f.y;
}

__device__ __forceinline__ void unpack(uint4 q, float (&to)[4], float) {
  to[0] = __uint_as_float(q.x), to[1] = __uint_as_float(q.y), to[2] = __uint_as_float(q.z), to[3] = __uint_as_float(q.w);
}
template <typename T>
__device__ __forceinline__ void unpack(uint4 q, float (&to)[8], T) {
  unpair(q.x, to, T()), unpair(q.y, to + 2, T()), unpair(q.z, to + 4, T()), unpair(q.w, to + 6, T());
}

// 0.5 v (1 + erf(v / sqrt 2)): GELU as torch defines it with approximate="none".
__device__ __forceinline__ float gelu(float v) { return 0.5f * v * (1.0f + erff(v * 0.70710678f)); }

}  // namespace dst_ops
