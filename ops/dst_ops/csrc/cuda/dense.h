// For the route through a dense product: W from its values, and the values' gradient from that of W.
#pragma once

#include "geometry.h"
#include "numbers.h"

namespace dst_ops {

// slots[unit] = where the unit is among the active ones, or -1. One block.
static __global__ void __launch_bounds__(1024) invert_offsets(const int* __restrict__ offsets, int* __restrict__ slots, Sizes s) {
  for (int i = threadIdx.x; i < s.longer / s.band; i += blockDim.x) slots[i] = -1;
  __syncthreads();
  for (int u = threadIdx.x; u < s.units; u += blockDim.x) slots[first_diagonal(offsets, u, s) / s.band] = u;
  __syncthreads();
  for (int u = threadIdx.x; u < s.units; u += blockDim.x) DST_OPS_ASSERT(slots[offsets[u]] == u, "dst_ops: offsets repeats a unit");
}

// W [out_features = s.out, in_features = s.in].
template <typename T>
__global__ void __launch_bounds__(256) dense_weight(const T* __restrict__ values, const int* __restrict__ slots, T* __restrict__ weight, Sizes s) {
  const bool tall = s.out >= s.in;
  for (int row = blockIdx.y; row < s.out; row += gridDim.y)
    for (int column = blockIdx.x * blockDim.x + threadIdx.x; column < s.in; column += gridDim.x * blockDim.x) {
      const int diagonal = wrapped(tall ? row - column : column - row, s.longer), slot = slots[diagonal / s.band];
      const int64_t at = (static_cast<int64_t>(slot) * s.band + diagonal % s.band) * s.shorter + (tall ? column : row);
      float value = 0.0f;
      if (slot >= 0) value = wide(values[at]);
      narrow(value, weight[static_cast<int64_t>(row) * s.in + column]);
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
