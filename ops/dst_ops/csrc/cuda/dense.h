// For the route through a dense product: W from its values, and the values' gradient from that of W.
#pragma once

#include "geometry.h"
#include "numbers.h"

namespace dst_ops {

// slots[diagonal] = where its values begin, in rows of values, or -1. One block.
static __global__ void __launch_bounds__(1024) invert_offsets(const int* __restrict__ offsets, int* __restrict__ slots, Sizes s) {
  for (int i = threadIdx.x; i < s.longer; i += blockDim.x) slots[i] = -1;
  __syncthreads();
  const int count = s.units * s.band;
  for (int k = threadIdx.x; k < count; k += blockDim.x) slots[first_diagonal(offsets, k / s.band, s) + k % s.band] = k;
  __syncthreads();
  for (int k = threadIdx.x; k < count; k += blockDim.x) DST_OPS_ASSERT(slots[offsets[k / s.band] * s.band + k % s.band] == k, "dst_ops: offsets repeats a unit");
}

// W [out_features = s.out, in_features = s.in]. A thread writes 16 bytes, neighbours of one row.
template <typename T>
__global__ void __launch_bounds__(256) dense_weight(const T* __restrict__ values, const int* __restrict__ slots, T* __restrict__ weight, Sizes s) {
  constexpr int P = pack_size<T>;
  const bool tall = s.out >= s.in;
  for (int row = blockIdx.y; row < s.out; row += gridDim.y)
    for (int first = (blockIdx.x * blockDim.x + threadIdx.x) * P; first < s.in; first += gridDim.x * blockDim.x * P) {
      union { uint4 whole; T part[P]; } q;
      q.whole = make_uint4(0, 0, 0, 0);
      const int count = s.in - first < P ? s.in - first : P;
#pragma unroll
      for (int e = 0; e < P; ++e) {
        const int column = first + e, slot = e < count ? slots[wrapped(tall ? row - column : column - row, s.longer)] : -1;
        if (slot >= 0) q.part[e] = values[static_cast<int64_t>(slot) * s.shorter + (tall ? column : row)];
      }
      T* to = weight + static_cast<int64_t>(row) * s.in + first;
      if (s.in % P == 0) {
        *reinterpret_cast<uint4*>(to) = q.whole;
      } else {
#pragma unroll
        for (int e = 0; e < P; ++e)
          if (e < count) to[e] = q.part[e];
      }
    }
}

// values [units * band, L] of a matrix [s.out, s.in] in fp32.
static __global__ void __launch_bounds__(256) take_diagonals(const float* __restrict__ matrix, const int* __restrict__ offsets, float* __restrict__ values, Sizes s) {
  const bool tall = s.out >= s.in;
  for (int k = blockIdx.y; k < s.units * s.band; k += gridDim.y) {
    const int diagonal = first_diagonal(offsets, k / s.band, s) + k % s.band;
    for (int l = blockIdx.x * blockDim.x + threadIdx.x; l < s.shorter; l += gridDim.x * blockDim.x) {
      const int other = wrapped(l + diagonal, s.longer);
      values[static_cast<int64_t>(k) * s.shorter + l] = matrix[static_cast<int64_t>(tall ? other : l) * s.in + (tall ? l : other)];
    }
  }
}

}  // namespace dst_ops
