// What the dispatcher-facing code and the per-instruction-set kernels share.
#pragma once

namespace dst_ops {

// Storage of the half types; conversions are in cpu/vectors.h.
struct Bf16 {
  unsigned short bits;
};
struct Fp16 {
  unsigned short bits;
};

// The type that sums of In are taken in.
template <typename In>
struct SumOf {
  typedef float type;
};
template <>
struct SumOf<double> {
  typedef double type;
};

// Units that a tile of adjacent outputs meets; see cpu/product.h.
struct Diagonals {
  const int* start;   // [count] first input row that the unit reads, counted from the tile; ascending
  const long* slot;   // [count] row of `values` where the unit begins
  long count, width;  // width: adjacent diagonals per unit
};

// Rows of the input for a product: sections of this many are left out where they are zero.
constexpr long section_rows = 32;

// One instruction set's inner loops for tensors of In; see cpu/kernels.h for what they compute.
template <typename In>
struct Kernels {
  typedef typename SumOf<In>::type T;
  int vector_bytes;
  int tokens, outputs;  // a tile with tokens in the lanes
  int tile, rows;       // a tile with features in the lanes
  void (*convert)(const In* in, long count, T* to);
  void (*transpose_in)(const In* in, long ld, long count, long features, T* to);
  void (*transpose_out)(const T* sums, long count, long features, const T* bias, In* out, long ld);
  void (*pack)(const In* values, long length, long period, const Diagonals& d, long base, bool along_input, T* to);
  void (*multiply)(const T* x, const Diagonals& d, const T* weight, T* sums, long from, long to);
  void (*accumulate)(const T* shorter, long ld_short, const T* longer, long ld_long, const int* start, T* grad, long entries);
};

namespace portable {
extern const Kernels<float> f32;
extern const Kernels<double> f64;
extern const Kernels<Bf16> bf16;
extern const Kernels<Fp16> fp16;
}  // namespace portable
namespace avx2 {
extern const Kernels<float> f32;
extern const Kernels<double> f64;
extern const Kernels<Bf16> bf16;
extern const Kernels<Fp16> fp16;
}  // namespace avx2
namespace avx512 {
extern const Kernels<float> f32;
extern const Kernels<double> f64;
extern const Kernels<Bf16> bf16;
extern const Kernels<Fp16> fp16;
}  // namespace avx512

}  // namespace dst_ops
