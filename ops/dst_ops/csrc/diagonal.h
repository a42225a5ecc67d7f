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

// A tile of outputs (those from `output` on), or the part of it before or after the wrap; see cpu/product.h.
struct Part {
  long output;         // the tile's first
  long row;            // of the input, where the tile's row 0 is
  long begin, end;     // sections of rows
  long first, last;    // units that meet those rows
  long weights;        // where those of unit `first` are packed
};

// Rows of the input for a product: sections of this many are left out where they are zero.
constexpr long section_rows = 32;

// Bytes from a row to the next where gradients are taken: known to the compiler, and not a multiple of
// what makes rows share the lines of a cache.
constexpr int gradient_stride = 2064 * 4;

// Diagonals whose offsets have one remainder.
struct Class {
  int remainder, count;
};

// One instruction set's inner loops for tensors of In; see cpu/kernels.h for what they compute.
template <typename In>
struct Kernels {
  typedef typename SumOf<In>::type T;
  int vector_bytes;
  int tokens, outputs;  // a tile with tokens in the lanes
  int few_tile;         // features of a tile with features in the lanes
  int gradient_tile, gradient_rows;  // features and tokens of a tile for the gradients of single diagonals
  int band_tile;        // features of a tile for the gradients of bands
  void (*convert)(const In* in, long count, T* to);
  void (*add_absolute)(const In* in, long count, T* to);
  void (*transpose_in)(const In* in, long ld, long count, long features, T* to, T* sums);
  void (*transpose_out)(const T* sums, long count, long features, const T* bias, In* out, long ld);
  void (*copy_in)(const In* in, long ld, long count, long features, T* to, T* sums);
  void (*copy_out)(const T* sums, long count, long features, const T* bias, In* out, long ld);
  void (*transpose_rows)(const In* in, long ld, long count, long features, T* to);
  void (*pack)(const In* values, long length, long period, const Diagonals& d, bool along_input, const Part* parts, long count, T* to);
  void (*multiply)(const T* x, const Diagonals& d, const T* weight, T* sums, long from, long to);
  void (*few)(const T* x, long ld, long count, const In* values, long length, long period, const Diagonals& d, bool along_input, long output, long many,
              const T* bias, In* out, long ld_out);
  void (*accumulate)(const T* shorter, const T* longer, const Class* classes, long count, const int* start, T* grad);
  void (*accumulate_band)(const T* shorter, const T* longer, long rows, long width, T* grad);  // null where accumulate is faster
};

// Each compiled for one instruction set; avx512_48k: where the first-level cache is larger than 32 KiB, see cpu/memory.h.
#define DST_OPS_KERNELS(isa)         \
  namespace isa {                    \
  extern const Kernels<float> f32;   \
  extern const Kernels<double> f64;  \
  extern const Kernels<Bf16> bf16;   \
  extern const Kernels<Fp16> fp16;   \
  }
DST_OPS_KERNELS(portable)
DST_OPS_KERNELS(avx2)
DST_OPS_KERNELS(avx512)
DST_OPS_KERNELS(avx512_48k)
#undef DST_OPS_KERNELS

}  // namespace dst_ops
