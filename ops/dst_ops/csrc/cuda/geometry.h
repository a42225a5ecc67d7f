// The index arithmetic that the kernels share.
//
// W has a longer side P and a shorter side L. A product is one of two forms, with k over active diagonals, o their offsets:
//   gather  (result of length L):  out[r] = sum_k v[k][r] in[(r + o) mod P]
//   scatter (result of length P):  out[r] = sum_k v[k][l] in[l]  where l = (r - o) mod P < L
// Scatter, too, is computed row by row of the result, so that sums have one order and nothing is added in memory; rows that a
// diagonal does not reach are left out before they cost a multiplication.
#pragma once

#include "platform.h"

namespace dst_ops {

struct Sizes {
  int64_t tokens;
  int in, out, longer, shorter;
  int units, band;  // diagonals: units * band
};

// i mod n for i in [-n, 2 n).
__device__ __forceinline__ int wrapped(int i, int n) {
  if (i < 0) i += n;
  return i >= n ? i - n : i;
}

// The first diagonal of a unit, checked: a wrong number would read beyond the tensors.
__device__ __forceinline__ int diagonal_of(int unit, const Sizes& s) {
  DST_OPS_ASSERT(unit >= 0 && unit < s.longer / s.band, "dst_ops: a number in offsets is not in [0, P / band)");
  return unit * s.band;
}
__device__ __forceinline__ int first_diagonal(const int* offsets, int u, const Sizes& s) { return diagonal_of(offsets[u], s); }

// Whether any of the indices first, ..., first + count - 1, modulo n, is below `end`. first in [0, n).
__device__ __forceinline__ bool meets(int first, int count, int end, int n) { return first < end || first + count > n; }

}  // namespace dst_ops
