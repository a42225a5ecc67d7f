// What the dispatcher-facing code and the per-instruction-set kernels share.
#pragma once

namespace dst_ops {

// One instruction set's inner loops for T = float or double; see cpu/kernels.h for what they compute.
template <typename T>
struct Kernels {
  int tile;  // columns computed at once
  int rows;  // rows computed at once
  void (*multiply)(const T* rows, long count, long ld, const int* start, const T* weight, long entries, const T* init, long ld_init, T* out, long ld_out);
  void (*accumulate)(const T* shorter, long ld_short, const T* longer, long ld_long, long count, const int* start, T* grad, long entries);
};

extern const Kernels<float> portable_f32, avx2_f32, avx512_f32;
extern const Kernels<double> portable_f64, avx2_f64, avx512_f64;

}  // namespace dst_ops
