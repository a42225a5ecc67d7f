// The inner loops, compiled once per instruction set (DST_OPS_ISA names the namespace, DST_OPS_VECTOR its bytes).
// No standard header may be included and nothing may be inline outside the namespace: an inline function compiled here
// with AVX-512 could be the copy that the linker keeps for everybody.
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

template <typename In, typename T = typename SumOf<In>::type>
static void convert(const In* in, long count, T* to) {
  constexpr int n = lanes<T>;
  long i = 0;
  for (; i + n <= count; i += n) store(to + i, load(in + i));
  In rest[n] = {};
  for (long r = i; r < count; ++r) rest[r - i] = in[r];
  const V<T> v = load(rest);
  for (long r = i; r < count; ++r) to[r] = v[r - i];
}

// The next row. Left to itself the compiler keeps the addresses of all rows of an unrolled loop, which do not fit into registers.
template <typename P>
static inline void step(P*& row, long ld) {
  row += ld;
  asm("" : "+r"(row));
}

// to[f][0..tokens) = in[0..count)[f], zeros for the tokens beyond count.
template <typename In, typename T = typename SumOf<In>::type>
static void transpose_in(const In* in, long ld, long count, long features, T* to) {
  constexpr int n = lanes<T>;
  for (long f = 0; f < features; f += n)
    for (long b = 0; b < tokens<T>; b += n) {
      V<T> v[n];
      if (b + n <= count && f + n <= features) {
        const In* row = in + b * ld + f;
#pragma GCC unroll 16
        for (int r = 0; r < n; ++r, step(row, ld)) v[r] = load(row);
        transpose<T>(v);
#pragma GCC unroll 16
        for (int c = 0; c < n; ++c) store(to + (f + c) * tokens<T> + b, v[c]);
        continue;
      }
      for (int r = 0; r < n; ++r) {
        In row[n] = {};
        for (long c = 0; c < n && b + r < count && f + c < features; ++c) row[c] = in[(b + r) * ld + f + c];
        v[r] = load(row);
      }
      transpose<T>(v);
      for (long c = 0; c < n && f + c < features; ++c) store(to + (f + c) * tokens<T> + b, v[c]);
    }
}

// out[0..count)[f] = sums[f][0..count) + bias[f].
template <typename In, typename T = typename SumOf<In>::type>
static void transpose_out(const T* sums, long count, long features, const T* bias, In* out, long ld) {
  constexpr int n = lanes<T>;
  for (long f = 0; f < features; f += n) {
    const V<T> add = load(bias + f);
    for (long b = 0; b < count; b += n) {
      V<T> v[n];
#pragma GCC unroll 16
      for (int c = 0; c < n; ++c) v[c] = load(sums + (f + c) * tokens<T> + b);
      transpose<T>(v);
      if (b + n <= count && f + n <= features) {
        In* row = out + b * ld + f;
#pragma GCC unroll 16
        for (int r = 0; r < n; ++r, step(row, ld)) store(row, v[r] + add);
        continue;
      }
      for (int r = 0; r < n && b + r < count; ++r) {
        In row[n];
        store(row, v[r] + add);
        for (long c = 0; c < n && f + c < features; ++c) out[(b + r) * ld + f + c] = row[c];
      }
    }
  }
}

// The weights of one tile in the order in which multiply reads them: to[unit][diagonal of the unit][output].
// Entries of a stored diagonal are numbered along the output (entry base + a belongs to output a) or along the input
// (entry base + start + d + a does, and the diagonals of a unit come last to first). Zero where there is no entry.
template <typename In, typename T = typename SumOf<In>::type>
static void pack(const In* values, long length, long period, const Diagonals& u, long base, bool along_input, T* to) {
  constexpr int n = lanes<T>, vectors = (outputs + n - 1) / n;
  for (long e = 0; e < u.count; ++e)
    for (long d = 0; d < u.width; ++d, to += outputs) {
      const In* v = values + (u.slot[e] + (along_input ? u.width - 1 - d : d)) * length;
      const long from = along_input ? base + u.start[e] + d : base;
      const In* some = v + from;
      In row[vectors * n];
      if (from < 0 || from + vectors * n > length) {
        for (int a = 0; a < vectors * n; ++a) {
          const long at = from + a < 0 ? from + a + period : from + a >= period ? from + a - period : from + a;
          row[a] = at >= 0 && at < length ? v[at] : In{};
        }
        some = row;
      }
      V<T> weight[vectors];
#pragma GCC unroll 8
      for (int i = 0; i < vectors; ++i) weight[i] = load(some + i * n);
      __builtin_memcpy(to, weight, outputs * sizeof(T));
    }
}

// sums[a][0..tokens) += sum over diagonals of weight[diagonal][a] * x[start + a][0..tokens), for rows from ... to - 1 of x:
// what generated code does (see codegen.h), in the same order, where there is none.
template <typename T>
static void multiply(const T* x, const Diagonals& u, const T* weight, T* sums, long from, long to) {
  const long count = u.count * u.width;
  const auto start = [&](long k) { return u.start[k / u.width] + k % u.width; };
  const auto part = [&](long k) {
    for (int a = 0; a < outputs; ++a) {
      const long row = start(k) + a;
      if (row < from || row >= to) continue;
      for (int v = 0; v < tokens<T>; v += lanes<T>)
        store(sums + a * tokens<T> + v, load(sums + a * tokens<T> + v) + weight[k * outputs + a] * load(x + row * tokens<T> + v));
    }
  };
  long k = 0;
  for (; k < count && start(k) < from; ++k) part(k);
  V<T> sum[outputs][token_vectors];
#pragma GCC unroll 16
  for (int a = 0; a < outputs; ++a)
#pragma GCC unroll 8
    for (int v = 0; v < token_vectors; ++v) sum[a][v] = load(sums + a * tokens<T> + v * lanes<T>);
  for (; k < count && start(k) + outputs <= to; ++k) {
    const T* row = x + start(k) * tokens<T>;
#pragma GCC unroll 16
    for (int a = 0; a < outputs; ++a)
#pragma GCC unroll 8
      for (int v = 0; v < token_vectors; ++v) sum[a][v] += weight[k * outputs + a] * load(row + a * tokens<T> + v * lanes<T>);
  }
#pragma GCC unroll 16
  for (int a = 0; a < outputs; ++a)
#pragma GCC unroll 8
    for (int v = 0; v < token_vectors; ++v) store(sums + a * tokens<T> + v * lanes<T>, sum[a][v]);
  for (; k < count && start(k) < to; ++k) part(k);
}

// grad[e][0..tile) += sum over rows r of shorter[r][0..tile) * longer[r][start[e] ... + tile).
template <typename T>
static void accumulate(const T* shorter, long ld_short, const T* longer, long ld_long, const int* start, T* grad, long entries) {
  constexpr int n = lanes<T>;
  V<T> s[rows][columns];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 3
    for (int c = 0; c < columns; ++c) s[r][c] = load(shorter + r * ld_short + c * n);
  for (long e = 0; e < entries; ++e, grad += tile_width<T>) {
    const T* u = longer + start[e];
    V<T> sum[columns];
#pragma GCC unroll 3
    for (int c = 0; c < columns; ++c) sum[c] = load(grad + c * n);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 3
      for (int c = 0; c < columns; ++c) sum[c] += s[r][c] * load(u + r * ld_long + c * n);
#pragma GCC unroll 3
    for (int c = 0; c < columns; ++c) store(grad + c * n, sum[c]);
  }
}

template <typename In, typename T = typename SumOf<In>::type>
constexpr Kernels<In> kernels = {DST_OPS_VECTOR, tokens<T>, outputs, tile_width<T>, rows, convert<In>, transpose_in<In>, transpose_out<In>, pack<In>, multiply<T>, accumulate<T>};

const Kernels<float> f32 = kernels<float>;
const Kernels<double> f64 = kernels<double>;
const Kernels<Bf16> bf16 = kernels<Bf16>;
const Kernels<Fp16> fp16 = kernels<Fp16>;

}  // namespace dst_ops::DST_OPS_ISA
