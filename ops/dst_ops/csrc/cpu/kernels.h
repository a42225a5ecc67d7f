// The inner loops, compiled once per instruction set (DST_OPS_ISA names the namespace, DST_OPS_VECTOR its bytes).
// No standard header may be included and nothing may be inline outside the namespace: an inline function compiled here
// with AVX-512 could be the copy that the linker keeps for everybody.
#pragma once

#include "tiles.h"

namespace dst_ops::DST_OPS_ISA {

// to[i] += |in[i]|
template <typename In, typename T = typename SumOf<In>::type>
static void add_absolute(const In* in, long count, T* to) {
  constexpr int n = lanes<T>;
  const auto absolute = [](auto v) { return v < 0 ? -v : v; };
  long i = 0;
  for (; i + n <= count; i += n) store(to + i, load(to + i) + absolute(load(in + i)));
  if (i < count) store_some(to + i, load_some(to + i, count - i) + absolute(load_some(in + i, count - i)), count - i);
}

// to[0..count) = from[0..count) for less than 2 * N elements.
template <int N, typename In>
static inline void copy_few(const In* from, long count, In* to) {
  if (count >= N) {
    __builtin_memcpy(to, from, N * sizeof(In));
    from += N, to += N, count -= N;
  }
  if constexpr (N > 1) copy_few<N / 2>(from, count, to);
}

// some[0..count) = v[(from + i) mod period], zeros where that is not below length; from lies in (-period, 2 period).
template <typename In>
static void wrapped(const In* v, long length, long period, long from, int count, In* some) {
  constexpr int n = lanes<typename SumOf<In>::type>;
  for (long i = 0, run; i < count; i += run) {
    const long at = from + i < 0 ? from + i + period : from + i >= period ? from + i - period : from + i, left = count - i;
    const long there = at < length ? length - at : at < period ? period - at : left;
    run = there < left ? there : left;
    if (at >= length) {
      for (long j = 0; j < run; ++j) some[i + j] = In{};
      continue;
    }
    long j = 0;
    for (; j + 2 * n <= run; j += n) __builtin_memcpy(some + i + j, v + at + j, n * sizeof(In));
    copy_few<n>(v + at + j, run - j, some + i + j);
  }
}

// The weights of some parts in the order in which products read them: to[part.weights ...] = [unit][diagonal][output].
// Entries of a stored diagonal are numbered along the output (entry l belongs to output l) or along the input (to row l
// of it, and the diagonals of a unit come last to first). Parts have room for a vector more than they need.
template <typename In, typename T = typename SumOf<In>::type>
static void pack(const In* values, long length, long period, const Diagonals& u, bool along_input, const Part* parts, long count, T* to) {
  constexpr int n = lanes<T>, vectors = (outputs + n - 1) / n;
  // Every other part is of the units before the wrap, the others are of those behind it: of many outputs, some neighbours meet a
  // run of the units of each, and looking at all units for them would take longer than the product.
  for (long half = 0; half < 2; ++half) {
    long first = u.count, last = 0;
    for (const Part* p = parts + half; p < parts + count; p += 2) {
      if (p->first >= p->last) continue;
      first = p->first < first ? p->first : first;
      last = p->last > last ? p->last : last;
    }
    for (long e = first; e < last; ++e)
      for (long d = 0; d < u.width; ++d) {
        const In* const v = values + (u.slot[e] + (along_input ? u.width - 1 - d : d)) * length;
        // All parts of a row of `values` in turn: rows may lie a multiple of the cache's size apart.
        for (const Part* p = parts + half; p < parts + count; p += 2) {
          if (e < p->first || e >= p->last) continue;
          const long from = along_input ? p->row + u.start[e] + d : p->output;
          const In* some = v + from;
          In edge[vectors * n];
          if (from < 0 || from + vectors * n > length) {
            wrapped(v, length, period, from, vectors * n, edge);
            some = edge;
          }
          T* const place = to + p->weights + ((e - p->first) * u.width + d) * outputs;
#pragma GCC unroll 8
          for (int i = 0; i < vectors; ++i) store(place + i * n, load(some + i * n));
        }
      }
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
        store(sums + a * tokens<T> + v, multiply_add(load(x + row * tokens<T> + v), V<T>{} + weight[k * outputs + a], load(sums + a * tokens<T> + v)));
    }
  };
  long k = 0;
  for (; k < count && start(k) < from; ++k) part(k);
  V<T> sum[outputs][token_vectors];
#pragma GCC unroll 28
  for (int a = 0; a < outputs; ++a)
#pragma GCC unroll 8
    for (int v = 0; v < token_vectors; ++v) sum[a][v] = load(sums + a * tokens<T> + v * lanes<T>);
  for (; k < count && start(k) + outputs <= to; ++k) {
    const T* row = x + start(k) * tokens<T>;
#pragma GCC unroll 28
    for (int a = 0; a < outputs; ++a)
#pragma GCC unroll 8
      for (int v = 0; v < token_vectors; ++v)
        sum[a][v] = multiply_add(load(row + a * tokens<T> + v * lanes<T>), V<T>{} + weight[k * outputs + a], sum[a][v]);
  }
#pragma GCC unroll 28
  for (int a = 0; a < outputs; ++a)
#pragma GCC unroll 8
    for (int v = 0; v < token_vectors; ++v) store(sums + a * tokens<T> + v * lanes<T>, sum[a][v]);
  for (; k < count && start(k) < to; ++k) part(k);
}

// out[r][0..many) of R tokens = outputs from `output` on, at most C vectors: features in the lanes. x: rows of
// length `period`, followed by their first C vectors.
template <int R, int C, typename In, typename T = typename SumOf<In>::type>
static void few_rows(const T* x, long ld, const In* values, long length, long period, const Diagonals& u, bool along_input, long output, long many,
                     const T* bias, In* out, long ld_out) {
  constexpr int n = lanes<T>, width = C * n, ahead = 24 / C;
  const auto row_of = [&](long e) {
    const long row = output + u.start[e];
    return row < period ? row : row - period;
  };
  V<T> sum[R][C] = {};
  for (long e = 0; e < u.count; ++e) {
    const long row = row_of(e), from = along_input ? row : output;
    const In *const v = values + u.slot[e] * length, *some = v + from;
    if (along_input && from >= length && from + width <= period) continue;  // zeros only
    if (e + ahead < u.count) {
      const In* const next = values + u.slot[e + ahead] * length + (along_input ? row_of(e + ahead) : output);
#pragma GCC unroll 12
      for (int line = 0; line < width * int(sizeof(In)); line += 64) __builtin_prefetch(reinterpret_cast<const char*>(next) + line);
    }
    In edge[width];
    if (from + width > length) {
      wrapped(v, length, period, from, width, edge);
      some = edge;
    }
    const T* xs = x + row;
    V<T> w[C];
#pragma GCC unroll 12
    for (int c = 0; c < C; ++c) w[c] = load(some + c * n);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r, step(xs, ld))
#pragma GCC unroll 12
      for (int c = 0; c < C; ++c) sum[r][c] = multiply_add(w[c], load(xs + c * n), sum[r][c]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
    for (int c = 0; c < C; ++c) store_some(out + r * ld_out + c * n, sum[r][c] + load(bias + c * n), many - c * n);
}

// The same for any number of tokens and outputs: the fewer tokens, the wider a tile, as far as sums and weights fit into the registers.
template <typename In, int R = rows, typename T = typename SumOf<In>::type>
static void few(const T* x, long ld, long count, const In* values, long length, long period, const Diagonals& u, bool along_input, long output, long many,
                const T* bias, In* out, long ld_out) {
  constexpr int registers = DST_OPS_VECTOR == 64 ? 32 : 16, C = columns * ((R + 1) * 4 * columns < registers ? 4 : (R + 1) * 2 * columns < registers ? 2 : 1);
  constexpr int wide = C * lanes<T>, least = tile_width<T>;
  for (; count >= R; count -= R, x += R * ld, out += R * ld_out) {
    long o = 0;
    for (; o + wide <= many; o += wide) few_rows<R, C>(x, ld, values, length, period, u, along_input, output + o, wide, bias + o, out + o, ld_out);
    for (; o < many; o += least) few_rows<R, columns>(x, ld, values, length, period, u, along_input, output + o, many - o, bias + o, out + o, ld_out);
  }
  if constexpr (R > 1) few<In, R / 2>(x, ld, count, values, length, period, u, along_input, output, many, bias, out, ld_out);
}

// grad[e][0..tile) += sum over rows r of shorter[r][-remainder ... + tile) * longer[r][start[e] ... + tile), class by class.
template <typename T>
static void accumulate(const T* shorter, const T* longer, const Class* classes, long count, const int* start, T* grad) {
  constexpr int n = lanes<T>, ld = gradient_stride / sizeof(T);
  for (long k = 0; k < count; ++k) {
    V<T> s[gradient_rows][gradient_columns];
#pragma GCC unroll 8
    for (int r = 0; r < gradient_rows; ++r)
#pragma GCC unroll 3
      for (int c = 0; c < gradient_columns; ++c) s[r][c] = load(shorter - classes[k].remainder + r * ld + c * n);
    for (const int* const end = start + classes[k].count; start < end; ++start, grad += gradient_columns * n) {
      const T* u = longer + *start;
      V<T> sum[gradient_columns];
#pragma GCC unroll 3
      for (int c = 0; c < gradient_columns; ++c) sum[c] = load(grad + c * n);
#pragma GCC unroll 8
      for (int r = 0; r < gradient_rows; ++r)
#pragma GCC unroll 3
        for (int c = 0; c < gradient_columns; ++c) sum[c] = multiply_add(s[r][c], load(u + r * ld + c * n), sum[c]);
#pragma GCC unroll 3
      for (int c = 0; c < gradient_columns; ++c) store(grad + c * n, sum[c]);
    }
  }
}

#if DST_OPS_VECTOR == 64
// u[D + d] = longer[D + d ... + lanes), d = 0 ... Count - 1: one in three by a load, two by shifting neighbouring vectors, since a
// load of an address that is not aligned takes twice the time of a multiply-add, and shifts go where multiply-adds go, too.
template <int D, int Count, typename T>
static inline void windows(const T* longer, V<T> low, V<T> high, V<T>* u) {
  typedef long long Integers __attribute__((vector_size(64)));
  const auto integers = [](V<T> v) { return reinterpret_cast<__m512i>(reinterpret_cast<Integers>(v)); };
  if constexpr (D % 3 == 0) u[D] = load(longer + D);
  else if constexpr (sizeof(T) == 4) u[D] = reinterpret_cast<V<T>>(_mm512_alignr_epi32(integers(high), integers(low), D));
  else u[D] = reinterpret_cast<V<T>>(_mm512_alignr_epi64(integers(high), integers(low), D));
  if constexpr (D + 1 < Count) windows<D + 1, Count>(longer, low, high, u);
}

// grad[d][0..lanes) += sum over rows r of shorter[r][0..lanes) * longer[r][d ... + lanes) for D diagonals d.
template <int D, typename T>
static inline void accumulate_diagonals(const T* shorter, const T* longer, long rows, T* grad) {
  constexpr int n = lanes<T>, ld = gradient_stride / sizeof(T);
  V<T> sum[D];
#pragma GCC unroll 16
  for (int d = 0; d < D; ++d) sum[d] = load(grad + d * band_tile<T>);
  for (long r = 0; r < rows; ++r, shorter += ld, longer += ld) {
    const V<T> s = load(shorter);
    V<T> u[D];
    windows<0, D>(longer, load(longer), load(longer + n), u);
#pragma GCC unroll 16
    for (int d = 0; d < D; ++d) sum[d] = multiply_add(s, u[d], sum[d]);
  }
#pragma GCC unroll 16
  for (int d = 0; d < D; ++d) store(grad + d * band_tile<T>, sum[d]);
}

// The same for 4, 8 or 16 diagonals and the band_tile features of a tile.
template <typename T>
static void accumulate_band(const T* shorter, const T* longer, long rows, long width, T* grad) {
  constexpr int n = lanes<T>;  // as many sums as fit into the registers, with windows
  for (int l = 0; l < band_tile<T>; l += n) {
    const T *const s = shorter + l, *const u = longer + l;
    if (width == 4) accumulate_diagonals<4>(s, u, rows, grad + l);
    else
      for (int d = 0; d < width; d += width < n ? 8 : n) {
        if (width < n) accumulate_diagonals<8>(s, u + d, rows, grad + d * band_tile<T> + l);
        else accumulate_diagonals<n>(s, u + d, rows, grad + d * band_tile<T> + l);
      }
  }
}
#endif

// With 16 registers, and shifts that take several instructions each, bands are quicker taken for single diagonals.
template <typename T>
constexpr void (*for_bands)(const T* shorter, const T* longer, long rows, long width, T* grad) =
#if DST_OPS_VECTOR == 64
    accumulate_band<T>;
#else
    nullptr;
#endif

template <typename In, typename T = typename SumOf<In>::type>
constexpr Kernels<In> kernels = {DST_OPS_VECTOR, tokens<T>, outputs, tile_width<T>, gradient_columns * lanes<T>, gradient_rows, band_tile<T>, convert<In>, add_absolute<In>, transpose_in<In>, transpose_out<In>, copy_in<In>, copy_out<In>, transpose_rows<In>, pack<In>, multiply<T>, few<In>, accumulate<T>, for_bands<T>};

const Kernels<float> f32 = kernels<float>;
const Kernels<double> f64 = kernels<double>;
const Kernels<Bf16> bf16 = kernels<Bf16>;
const Kernels<Fp16> fp16 = kernels<Fp16>;

}  // namespace dst_ops::DST_OPS_ISA
