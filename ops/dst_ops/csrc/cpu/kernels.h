// The two inner loops, compiled once per instruction set (DST_OPS_ISA names the namespace, DST_OPS_VECTOR its bytes).
// No standard header may be included and nothing may be inline outside the namespace: an inline function compiled here
// with AVX-512 could be the copy that the linker keeps for everybody.
#pragma once

namespace DST_OPS_ISA {

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(DST_OPS_VECTOR), aligned(alignof(T)), may_alias));
  static constexpr int lanes = DST_OPS_VECTOR / sizeof(T);
};

// A register tile is DST_OPS_ROWS rows times this many vectors: sums and weights fill the 16 (AVX-512: 32) registers.
constexpr int columns = 3;

template <typename T>
constexpr int tile_width = columns * Vector<T>::lanes;

template <typename T>
static inline typename Vector<T>::type load(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::type*>(p);
}

template <typename T>
static inline void store(T* p, typename Vector<T>::type v) {
  *reinterpret_cast<typename Vector<T>::type*>(p) = v;
}

// out[r][0..tile) = init[r][0..tile) + sum_e weight[e][0..tile) * rows[r][start[e] ... + tile) for ROWS rows.
template <typename T, int ROWS>
static void multiply_rows(const T* rows, long ld, const int* start, const T* weight, long entries, const T* init, long ld_init, T* out, long ld_out) {
  using V = typename Vector<T>::type;
  constexpr int n = Vector<T>::lanes;
  V sum[ROWS][columns];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
    for (int c = 0; c < columns; ++c) sum[r][c] = load(init + r * ld_init + c * n);
  for (long e = 0; e < entries; ++e) {
    const T* x = rows + start[e];
    V w[columns];
#pragma GCC unroll 3
    for (int c = 0; c < columns; ++c) w[c] = load(weight + (e * columns + c) * n);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
      for (int c = 0; c < columns; ++c) sum[r][c] += w[c] * load(x + r * ld + c * n);
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
    for (int c = 0; c < columns; ++c) store(out + r * ld_out + c * n, sum[r][c]);
}

// grad[e][0..tile) += sum_r shorter[r][0..tile) * longer[r][start[e] ... + tile) for ROWS rows.
template <typename T, int ROWS>
static void accumulate_rows(const T* shorter, long ld_short, const T* longer, long ld_long, const int* start, T* grad, long entries) {
  using V = typename Vector<T>::type;
  constexpr int n = Vector<T>::lanes;
  V s[ROWS][columns];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
    for (int c = 0; c < columns; ++c) s[r][c] = load(shorter + r * ld_short + c * n);
  for (long e = 0; e < entries; ++e) {
    T* g = grad + e * columns * n;
    const T* u = longer + start[e];
    V sum[columns];
#pragma GCC unroll 3
    for (int c = 0; c < columns; ++c) sum[c] = load(g + c * n);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
      for (int c = 0; c < columns; ++c) sum[c] += s[r][c] * load(u + r * ld_long + c * n);
#pragma GCC unroll 3
    for (int c = 0; c < columns; ++c) store(g + c * n, sum[c]);
  }
}

template <typename T>
static void multiply(const T* rows, long count, long ld, const int* start, const T* weight, long entries, const T* init, long ld_init, T* out, long ld_out) {
  long r = 0;
  for (; r + DST_OPS_ROWS <= count; r += DST_OPS_ROWS)
    multiply_rows<T, DST_OPS_ROWS>(rows + r * ld, ld, start, weight, entries, init + r * ld_init, ld_init, out + r * ld_out, ld_out);
  for (; r < count; ++r) multiply_rows<T, 1>(rows + r * ld, ld, start, weight, entries, init + r * ld_init, ld_init, out + r * ld_out, ld_out);
}

template <typename T>
static void accumulate(const T* shorter, long ld_short, const T* longer, long ld_long, long count, const int* start, T* grad, long entries) {
  long r = 0;
  for (; r + DST_OPS_ROWS <= count; r += DST_OPS_ROWS)
    accumulate_rows<T, DST_OPS_ROWS>(shorter + r * ld_short, ld_short, longer + r * ld_long, ld_long, start, grad, entries);
  for (; r < count; ++r)
    accumulate_rows<T, 1>(shorter + r * ld_short, ld_short, longer + r * ld_long, ld_long, start, grad, entries);
}

template <typename T>
constexpr dst_ops::Kernels<T> kernels = {tile_width<T>, DST_OPS_ROWS, multiply<T>, accumulate<T>};

}  // namespace DST_OPS_ISA
