// Vectors of one instruction set, conversions and the transposition of a square of them.
#pragma once

#include "../diagonal.h"

namespace dst_ops::DST_OPS_ISA {

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(DST_OPS_VECTOR), aligned(alignof(T)), may_alias));
  static constexpr int lanes = DST_OPS_VECTOR / sizeof(T);
};
template <typename T>
using V = typename Vector<T>::type;
template <typename T>
constexpr int lanes = Vector<T>::lanes;

typedef unsigned Bits __attribute__((vector_size(DST_OPS_VECTOR)));
typedef float Floats __attribute__((vector_size(DST_OPS_VECTOR)));
typedef unsigned short Halves __attribute__((vector_size(DST_OPS_VECTOR / 2), aligned(2), may_alias));

static inline Floats floats(Bits b) { return reinterpret_cast<Floats>(b); }
static inline Bits bits(Floats f) { return reinterpret_cast<Bits>(f); }
static inline Bits choose(Bits mask, Bits yes, Bits no) { return (mask & yes) | (~mask & no); }

// lanes<sum type> adjacent elements, converted to or from the type of the sums.
static inline V<float> load(const float* p) { return *reinterpret_cast<const V<float>*>(p); }
static inline V<double> load(const double* p) { return *reinterpret_cast<const V<double>*>(p); }
static inline void store(float* p, V<float> v) { *reinterpret_cast<V<float>*>(p) = v; }
static inline void store(double* p, V<double> v) { *reinterpret_cast<V<double>*>(p) = v; }

static inline V<float> load(const Bf16* p) {
  return floats(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits) << 16);
}
static inline void store(Bf16* p, V<float> v) {
  const Bits b = bits(v), even = b + 0x7fff + (b >> 16 & 1);  // round to nearest, ties to even
  const Bits quiet = b | 0x400000;                             // NaN: rounding could carry it into the sign
  *reinterpret_cast<Halves*>(p) = __builtin_convertvector(choose(Bits(v != v), quiet, even) >> 16, Halves);
}

static inline V<float> load(const Fp16* p) {
  const Bits h = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits), shifted = (h & 0x7fff) << 13;
  Bits b = bits(floats(shifted) * 0x1p112f);  // from the exponent's bias 15 to 127; right for subnormal numbers too
  b = choose(Bits(shifted >= 0x0f800000u), shifted | 0x7f800000u, b);  // infinity and NaN
  return floats(b | (h & 0x8000) << 16);
}
static inline void store(Fp16* p, V<float> v) {
  const Bits b = bits(v), sign = b & 0x80000000u, a = b ^ sign;
  const Bits normal = (a - 0x38000000u + 0xfff + (a >> 13 & 1)) >> 13;  // carries into infinity where it must
  const Bits small = bits(floats(a) + 0.5f) - 0x3f000000u;              // the adder rounds to a multiple of 2^-24
  const Bits special = choose(Bits(a > 0x7f800000u), Bits{} + 0x7e00, Bits{} + 0x7c00);
  Bits h = choose(Bits(a < 0x38800000u), small, normal);
  h = choose(Bits(a >= 0x47800000u), special, h);
  *reinterpret_cast<Halves*>(p) = __builtin_convertvector(h | sign >> 16, Halves);
}

template <int... I>
struct Sequence {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  typedef Sequence<I...> type;
};

// Of the square that some vectors make, exchange bit S of the lane with bit S of the vector's number, for two vectors
// whose numbers differ in that bit only.
template <int S, typename VT, int... I>
static inline void exchange(VT& low, VT& high, Sequence<I...>) {
  const VT a = low, b = high;
  low = __builtin_shufflevector(a, b, (I & S ? int(sizeof...(I)) + I - S : I)...);
  high = __builtin_shufflevector(a, b, (I & S ? int(sizeof...(I)) + I : I + S)...);
}

template <int S, typename T>
static inline void transpose_bits(V<T> (&v)[lanes<T>]) {
  if constexpr (S < lanes<T>) {
#pragma GCC unroll 16
    for (int r = 0; r < lanes<T>; ++r)
      if (!(r & S)) exchange<S>(v[r], v[r + S], typename Count<lanes<T>>::type{});
    transpose_bits<2 * S, T>(v);
  }
}

// v[i] lane j <-> v[j] lane i.
template <typename T>
static inline void transpose(V<T> (&v)[lanes<T>]) {
  transpose_bits<1, T>(v);
}

}  // namespace dst_ops::DST_OPS_ISA
