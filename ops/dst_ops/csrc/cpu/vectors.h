// Vectors of one instruction set, conversions and transposition.
#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif

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

// lanes<sum type> adjacent elements, converted to or from the type of the sums.
static inline V<float> load(const float* p) { return *reinterpret_cast<const V<float>*>(p); }
static inline V<double> load(const double* p) { return *reinterpret_cast<const V<double>*>(p); }
static inline void store(float* p, V<float> v) { *reinterpret_cast<V<float>*>(p) = v; }
static inline void store(double* p, V<double> v) { *reinterpret_cast<V<double>*>(p) = v; }

// a * b + sum, rounded once where generated code does so too. Said and not left to the compiler, which would decide by its options.
#if defined(__AVX512F__)
static inline V<float> multiply_add(V<float> a, V<float> b, V<float> sum) {
  return reinterpret_cast<V<float>>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(sum)));
}
static inline V<double> multiply_add(V<double> a, V<double> b, V<double> sum) {
  return reinterpret_cast<V<double>>(_mm512_fmadd_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(sum)));
}
#elif defined(__FMA__)
static inline V<float> multiply_add(V<float> a, V<float> b, V<float> sum) {
  return reinterpret_cast<V<float>>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(sum)));
}
static inline V<double> multiply_add(V<double> a, V<double> b, V<double> sum) {
  return reinterpret_cast<V<double>>(_mm256_fmadd_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(sum)));
}
#else
template <typename VT>
static inline VT multiply_add(VT a, VT b, VT sum) {
  return a * b + sum;
}
#endif

static inline V<float> load(const Bf16* p) {
  return floats(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits) << 16);
}
// The upper half rounded to nearest, ties to even. A NaN that comes of numbers of 16 bits has nothing in its lower half that could carry.
static inline Bits rounded(V<float> v) {
  const Bits b = bits(v);
  return b + 0x7fff + (b >> 16 & 1);
}
static inline Halves lower_halves(Bits b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Halves>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(b)));  // the compiler makes six instructions of it
#else
  return __builtin_convertvector(b, Halves);
#endif
}
static inline Halves narrow(Bf16*, V<float> v) { return lower_halves(rounded(v) >> 16); }

#if defined(__AVX512F__)
static inline V<float> load(const Fp16* p) { return reinterpret_cast<V<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))); }
static inline Halves narrow(Fp16*, V<float> v) { return reinterpret_cast<Halves>(_mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__F16C__)
static inline V<float> load(const Fp16* p) { return reinterpret_cast<V<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
static inline Halves narrow(Fp16*, V<float> v) { return reinterpret_cast<Halves>(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT)); }
#else
static inline V<float> load(const Fp16* p) {
  const Bits h = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits), shifted = (h & 0x7fff) << 13;
  const Bits finite = bits(floats(shifted) * 0x1p112f);  // from the exponent's bias 15 to 127; right for subnormal numbers too
  return floats((shifted >= 0x0f800000u ? shifted | 0x7f800000u : finite) | (h & 0x8000) << 16);  // infinity and NaN
}
static inline Halves narrow(Fp16*, V<float> v) {
  const Bits b = bits(v), sign = b & 0x80000000u, a = b ^ sign;
  const Bits normal = (a - 0x38000000u + 0xfff + (a >> 13 & 1)) >> 13;  // carries into infinity where it must
  const Bits small = bits(floats(a) + 0.5f) - 0x3f000000u;              // the adder rounds to a multiple of 2^-24
  const Bits special = a > 0x7f800000u ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
  const Bits h = a >= 0x47800000u ? special : a < 0x38800000u ? small : normal;
  return __builtin_convertvector(h | sign >> 16, Halves);
}
#endif

// Two numbers of 16 bits in each lane, the first in the lower half.
static inline V<float> paired(Bf16*, V<float> first, V<float> second) { return floats(rounded(first) >> 16 | (rounded(second) & 0xffff0000u)); }
static inline V<float> paired(Fp16* p, V<float> first, V<float> second) {
  return floats(__builtin_convertvector(narrow(p, first), Bits) | __builtin_convertvector(narrow(p, second), Bits) << 16);
}

template <typename Half>
static inline void store(Half* p, V<float> v) {
  *reinterpret_cast<Halves*>(p) = narrow(p, v);
}

// store() to an aligned address past the caches, where the instruction set can; not visible to others before the fence.
template <typename T>
static inline void store_past(T* p, V<typename SumOf<T>::type> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(narrow(p, v)));
  else _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 2) _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(narrow(p, v)));
  else _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#else
  store(p, v);
#endif
}
static inline void store_fence() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

template <int... I>
struct Sequence {};
template <int N, int... I>
struct Numbers : Numbers<N - 1, N - 1, I...> {};
template <int... I>
struct Numbers<0, I...> {
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
      if (!(r & S)) exchange<S>(v[r], v[r + S], typename Numbers<lanes<T>>::type{});
    transpose_bits<2 * S, T>(v);
  }
}

// v[i] lane j <-> v[j] lane i.
template <typename T>
static inline void transpose(V<T> (&v)[lanes<T>]) {
  transpose_bits<1, T>(v);
}

// Elements of T in 16 bytes.
template <typename T>
constexpr int group = 16 / sizeof(T);

template <typename T, int Count>
struct Piece {
  typedef T type __attribute__((vector_size(Count * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <typename W, typename H, int... I>
static inline W joined(H low, H high, Sequence<I...>) {
  return __builtin_shufflevector(low, high, I...);
}

// Count elements: group<T> from each of Count / group<T> rows of p.
template <int Count, typename T>
static inline auto pieces(const T* p, long ld) {
  typedef typename Piece<T, Count>::type W;
  if constexpr (Count == group<T>) {
    return *reinterpret_cast<const W*>(p);
  } else {
    return joined<W>(pieces<Count / 2>(p, ld), pieces<Count / 2>(p + Count / 2 / group<T> * ld, ld), typename Numbers<Count>::type{});
  }
}

// Of each 16 bytes the low or high halves of a and b, in turn by S elements.
template <int S, int High, typename VT, int... I>
static inline VT interleaved(VT a, VT b, Sequence<I...>) {
  constexpr int n = sizeof...(I), g = 16 * n / DST_OPS_VECTOR;
  return __builtin_shufflevector(a, b, (I / g * g + High * g / 2 + I % g / S / 2 * S + I % S + (I / S & 1) * n)...);
}

// v[c] lane r = p[r ld + c] for group<T> columns c: a part of a transposition. Loads that insert 16 bytes cost less than the
// shuffles that they replace, where rows lie together in the first-level cache.
template <typename T>
static inline void columns_of(const T* p, long ld, V<T> (&v)[group<T>]) {
  typedef typename Numbers<lanes<T>>::type All;
  V<T> row[group<T>];
#pragma GCC unroll 4
  for (int r = 0; r < group<T>; ++r, p += ld) {
    asm("" : "+r"(p));  // or the compiler keeps the addresses of all rows, which do not fit into registers
    row[r] = pieces<lanes<T>>(p, group<T> * ld);
  }
  if constexpr (group<T> == 2) {
    v[0] = interleaved<1, 0>(row[0], row[1], All{}), v[1] = interleaved<1, 1>(row[0], row[1], All{});
  } else {
    const V<T> a = interleaved<1, 0>(row[0], row[1], All{}), b = interleaved<1, 0>(row[2], row[3], All{});
    const V<T> c = interleaved<1, 1>(row[0], row[1], All{}), d = interleaved<1, 1>(row[2], row[3], All{});
    v[0] = interleaved<2, 0>(a, b, All{}), v[1] = interleaved<2, 1>(a, b, All{});
    v[2] = interleaved<2, 0>(c, d, All{}), v[3] = interleaved<2, 1>(c, d, All{});
  }
}

}  // namespace dst_ops::DST_OPS_ISA
