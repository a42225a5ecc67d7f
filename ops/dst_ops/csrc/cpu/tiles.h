// Tiles: their sizes, and what brings numbers of a tensor into one and back. Included by kernels.h only.
#pragma once

#include "vectors.h"

namespace dst_ops::DST_OPS_ISA {

// A tile of outputs with tokens in the lanes: DST_OPS_OUTPUTS outputs of `token_vectors` vectors of tokens.
constexpr int outputs = DST_OPS_OUTPUTS, token_vectors = DST_OPS_TOKEN_VECTORS;
template <typename T>
constexpr int tokens = token_vectors* lanes<T>;

// A tile with features in the lanes: DST_OPS_ROWS rows times this many vectors; sums and weights fill the 16 (AVX-512: 32) registers.
constexpr int rows = DST_OPS_ROWS, columns = 3;
template <typename T>
constexpr int tile_width = columns* lanes<T>;

// A tile for the gradients of single diagonals: so many numbers of the shorter rows, and a row of sums, fill the registers.
constexpr int gradient_rows = DST_OPS_VECTOR == 64 ? 8 : 6, gradient_columns = DST_OPS_VECTOR == 64 ? 3 : 2;

// A tile of features for the gradients of bands.
template <typename T>
constexpr int band_tile = 4 * lanes<T>;

// The first `count` elements and zeros, if there are not enough for a vector.
template <typename In, typename T = typename SumOf<In>::type>
static inline V<T> load_some(const In* in, long count) {
  if (count >= lanes<T>) return load(in);
  In some[lanes<T>] = {};
  for (long i = 0; i < count; ++i) some[i] = in[i];
  return load(some);
}
template <typename In, typename T = typename SumOf<In>::type>
static inline void store_some(In* out, V<T> v, long count) {
  if (count >= lanes<T>) return store(out, v);
  In some[lanes<T>];
  store(some, v);
  for (long i = 0; i < count; ++i) out[i] = some[i];
}

template <typename In, typename T = typename SumOf<In>::type>
static void convert(const In* in, long count, T* to) {
  constexpr int n = lanes<T>;
  long i = 0;
  for (; i + n <= count; i += n) store(to + i, load(in + i));
  if (i < count) store_some(to + i, load_some(in + i, count - i), count - i);
}

// The next row. Left to itself the compiler keeps the addresses of all rows of an unrolled loop, which do not fit into registers.
template <typename P>
static inline void step(P*& row, long ld) {
  row += ld;
  asm("" : "+r"(row));
}

// to[f][0..tokens) = in[0..count)[f], zeros for the tokens beyond count. sums, if not null: [f] receives the sum over tokens, and
// has room for a whole vector of features.
template <typename In, typename T = typename SumOf<In>::type>
static void transpose_in(const In* in, long ld, long count, long features, T* to, T* sums) {
  constexpr int n = lanes<T>;
  for (long f = 0; f < features; f += n) {
    V<T> sum[4] = {};  // in turn: one would make every addition wait for the last
    for (long b = 0; b < tokens<T>; b += n) {
      V<T> v[n];
      if (b + n <= count && f + n <= features) {
        const In* row = in + b * ld + f;
#pragma GCC unroll 16
        for (int r = 0; r < n; ++r, step(row, ld)) v[r] = load(row);
#pragma GCC unroll 16
        for (int r = 0; r < n; ++r) sum[r % 4] += v[r];
        transpose<T>(v);
#pragma GCC unroll 16
        for (int c = 0; c < n; ++c) store(to + (f + c) * tokens<T> + b, v[c]);
        continue;
      }
#pragma GCC unroll 16
      for (int r = 0; r < n; ++r) {  // written out, or sums would be in memory
        v[r] = b + r < count ? load_some(in + (b + r) * ld + f, features - f) : V<T>{};
        sum[r % 4] += v[r];
      }
      transpose<T>(v);
      for (long c = 0; c < n && f + c < features; ++c) store(to + (f + c) * tokens<T> + b, v[c]);
    }
    if (sums != nullptr) store(sums + f, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

// out[0..count)[f] = sums[f][0..count) + bias[f]; sums and bias are readable up to a whole vector of features. Whole lines
// go past the caches: writing one there would first read what it held.
template <typename In, typename T = typename SumOf<In>::type>
static void transpose_out(const T* sums, long count, long features, const T* bias, In* out, long ld) {
  constexpr int n = lanes<T>;
  constexpr int line = 64 / sizeof(In);
  // Where a vector of pairs is a line, numbers of 16 bits are rounded and paired first: half as many vectors are transposed then.
  constexpr bool pairs = sizeof(In) == 2 && 2 * n == line;
  constexpr int many = pairs ? n : group<T>;  // tokens at a time
  const bool aligned = (reinterpret_cast<unsigned long>(out) | ld * sizeof(In)) % 64 == 0;
  for (long b = 0; b < count; b += many) {
    long f = 0;
    for (; aligned && b + many <= count && f + line <= features; f += line) {
      if constexpr (pairs) {
        V<float> v[n];
        const float* from = sums + f * tokens<T> + b;
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i, step(from, 2 * tokens<T>)) v[i] = paired(out, load(from) + bias[f + 2 * i], load(from + tokens<T>) + bias[f + 2 * i + 1]);
        transpose<float>(v);
        In* to = out + b * ld + f;
#pragma GCC unroll 16
        for (int r = 0; r < n; ++r, step(to, ld)) store_past(reinterpret_cast<float*>(to), v[r]);
      } else {
        V<T> v[line / n][many], add[line / n];
#pragma GCC unroll 8
        for (int w = 0; w < line / n; ++w) columns_of(sums + (f + w * n) * tokens<T> + b, tokens<T>, v[w]), add[w] = load(bias + f + w * n);
#pragma GCC unroll 4
        for (int r = 0; r < many; ++r)
#pragma GCC unroll 8
          for (int w = 0; w < line / n; ++w) store_past(out + (b + r) * ld + f + w * n, v[w][r] + add[w]);
      }
    }
    for (; f < features; f += n)
      for (int c = 0; c < many; c += group<T>) {
        V<T> v[group<T>];
        columns_of(sums + f * tokens<T> + b + c, tokens<T>, v);
        for (int r = 0; r < group<T> && b + c + r < count; ++r) store_some(out + (b + c + r) * ld + f, v[r] + load(bias + f), features - f);
      }
  }
  store_fence();
}

// As transpose_in where tokens lie side by side: to[f][0..tokens) = in[f][0..count).
template <typename In, typename T = typename SumOf<In>::type>
static void copy_in(const In* in, long ld, long count, long features, T* to, T* sums) {
  constexpr int n = lanes<T>;
  for (long f = 0; f < features; ++f)
#pragma GCC unroll 4
    for (int b = 0; b < tokens<T>; b += n) store(to + f * tokens<T> + b, load_some(in + f * ld + b, count - b));
  for (long f = 0; f < features && sums != nullptr; f += n) {
    V<T> sum[n];
    for (long c = 0; c < n; ++c) {
      sum[c] = V<T>{};
      for (int b = 0; b < tokens<T> && f + c < features; b += n) sum[c] += load(to + (f + c) * tokens<T> + b);
    }
    transpose<T>(sum);
#pragma GCC unroll 16
    for (int c = 1; c < n; ++c) sum[0] += sum[c];
    store(sums + f, sum[0]);
  }
}

// As transpose_out where tokens lie side by side: out[f][0..count) = sums[f][0..count) + bias[f].
template <typename In, typename T = typename SumOf<In>::type>
static void copy_out(const T* sums, long count, long features, const T* bias, In* out, long ld) {
  constexpr int n = lanes<T>;
  const bool whole = count == tokens<T> && (reinterpret_cast<unsigned long>(out) | ld * sizeof(In)) % 64 == 0;
  for (long f = 0; f < features; ++f, sums += tokens<T>, out += ld) {
    const V<T> add = V<T>{} + bias[f];
#pragma GCC unroll 4
    for (int b = 0; b < tokens<T>; b += n) {
      const V<T> v = load(sums + b) + add;
      if (whole) store_past(out + b, v);
      else store_some(out + b, v, count - b);
    }
  }
  store_fence();
}

// Tokens that lie side by side, one after the other: to[b][0..features) = in[0..features)[b], rows gradient_stride apart. Whole squares
// of tokens are written: those beyond count are zero.
template <typename In, typename T = typename SumOf<In>::type>
static void transpose_rows(const In* in, long ld, long count, long features, T* to) {
  constexpr int n = lanes<T>, to_ld = gradient_stride / sizeof(T);
  for (long b = 0; b < count; b += n)
    for (long f = 0; f < features; f += n) {
      V<T> v[n];
      const In* row = in + f * ld + b;
      if (f + n <= features && b + n <= count) {
#pragma GCC unroll 16
        for (int c = 0; c < n; ++c, step(row, ld)) v[c] = load(row);
      } else {
        for (long c = 0; c < n; ++c) v[c] = f + c < features ? load_some(row + c * ld, count - b) : V<T>{};
      }
      transpose<T>(v);
      T* place = to + b * to_ld + f;
#pragma GCC unroll 16
      for (int r = 0; r < n; ++r, step(place, to_ld)) store_some(place, v[r], features - f);
    }
}

}  // namespace dst_ops::DST_OPS_ISA
