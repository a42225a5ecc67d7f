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

template <typename T>
constexpr int tile_width = 2 * Vector<T>::lanes;

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
  V sum[ROWS][2];
  for (int r = 0; r < ROWS; ++r) {
    sum[r][0] = load(init + r * ld_init);
    sum[r][1] = load(init + r * ld_init + n);
  }
  for (long e = 0; e < entries; ++e) {
    const V w0 = load(weight + e * 2 * n), w1 = load(weight + e * 2 * n + n);
    const T* x = rows + start[e];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      sum[r][0] += w0 * load(x + r * ld);
      sum[r][1] += w1 * load(x + r * ld + n);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    store(out + r * ld_out, sum[r][0]);
    store(out + r * ld_out + n, sum[r][1]);
  }
}

// grad[e][0..tile) += sum_r shorter[r][0..tile) * longer[r][start[e] ... + tile) for ROWS rows.
template <typename T, int ROWS>
static void accumulate_rows(const T* shorter, long ld_short, const T* longer, long ld_long, const int* start, T* grad, long entries) {
  using V = typename Vector<T>::type;
  constexpr int n = Vector<T>::lanes;
  V s[ROWS][2];
  for (int r = 0; r < ROWS; ++r) {
    s[r][0] = load(shorter + r * ld_short);
    s[r][1] = load(shorter + r * ld_short + n);
  }
  for (long e = 0; e < entries; ++e) {
    T* g = grad + e * 2 * n;
    V g0 = load(g), g1 = load(g + n);
    const T* u = longer + start[e];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      g0 += s[r][0] * load(u + r * ld_long);
      g1 += s[r][1] * load(u + r * ld_long + n);
    }
    store(g, g0);
    store(g + n, g1);
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
