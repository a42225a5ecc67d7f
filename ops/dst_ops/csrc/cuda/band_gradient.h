// Gradient of the values of bands on tensor cores: for each band the product of shorter^T and a window of longer, both taken
// through shared memory, tokens as the summed dimension. 16 positions l meet W + 15 columns, in W / 8 + 2 blocks of 8 columns:
// W / (W + 16) of the multiplications are useful.
#pragma once

#include "band.h"

namespace dst_ops {

constexpr int gradient_warps = 8;
constexpr int gradient_tokens = 32;              // of a stage; two stages, one being read while the other is filled
constexpr int gradient_columns = gradient_warps * 32;  // positions l of a block: 32 a warp

// Bands that a block computes: their windows share the shorter side's columns, their sums fill the registers.
template <int W>
constexpr int gradient_bands = W == 64 ? 1 : 2;

// Elements from a row of shared memory to the next: an odd number of 16-byte pieces, see band_pitch.
template <int W>
struct GradientLayout {
  static constexpr int window = gradient_columns + W;
  static constexpr int pairs = (W / 8 + 5) / 2;  // of blocks that a warp reads; for W = 8 one block more than the window has
  static constexpr int short_pitch = (gradient_columns / 8 | 1) * 8, long_pitch = ((gradient_columns / 8 - 4 + 2 * pairs) | 1) * 8;
  static constexpr int stage = gradient_tokens * (short_pitch + gradient_bands<W> * long_pitch);
  static constexpr int sums = gradient_warps * gradient_bands<W> * W * 33 * 4;  // bytes; reuses the stages' memory
  static constexpr int bytes = 2 * stage * 2 > sums ? 2 * stage * 2 : sums;
};

// Copies 32 tokens' columns [l0, l0 + 256) of the shorter side and the bands' windows of the longer one, eight lanes a line of 128
// bytes: see stage_window. A warp takes 4 tokens of each; what a window has beyond four lines is shared out at the end.
template <typename T, int W>
__device__ __forceinline__ void stage_gradient(T* to, const T* shorter, const T* longer, const int* start, int64_t token, int64_t end, int l0, const Sizes& s) {
  using Layout = GradientLayout<W>;
  constexpr int each = gradient_tokens / gradient_warps;
  static_assert(gradient_columns == 32 * 8 && gradient_tokens * 8 == gradient_warps * 32 && Layout::window / 8 + 8 - (W < 64 ? W / 8 : 8) <= 40);
  const int column = threadIdx.x % 32 * 8, first = threadIdx.x / 32 * each;
  const int left = static_cast<int>(end - token < gradient_tokens ? end - token : gradient_tokens);  // rows that are there
  const bool inside = l0 + column < s.shorter;
  const T* from = shorter + token * s.shorter + l0 + column;
#pragma unroll
  for (int i = 0; i < each; ++i) {
    const bool present = inside && first + i < left;
    copy_async(to + (first + i) * Layout::short_pitch + column, present ? from + static_cast<int64_t>(first + i) * s.shorter : shorter, present);
  }
  to += gradient_tokens * Layout::short_pitch;
#pragma unroll
  for (int b = 0; b < gradient_bands<W>; ++b, to += gradient_tokens * Layout::long_pitch) {
    if (start[b] < 0) continue;
    const int before = start[b] % 64;  // l0 is a multiple of 64
    // Counted from the window's first column; l0 < P, start < P; the window may go round more than once where P is small.
    const auto position = [&](int column) {
      int at = l0 + start[b] + column;
      while (at >= s.longer) at -= s.longer;
      return at;
    };
    if (column >= before) {
      const T* from = longer + token * s.longer + position(column - before);
#pragma unroll
      for (int i = 0; i < each; ++i) {
        const bool present = first + i < left;
        copy_async(to + (first + i) * Layout::long_pitch + column - before, present ? from + static_cast<int64_t>(first + i) * s.longer : longer, present);
      }
    }
    const int row = threadIdx.x / 8, further = gradient_columns + threadIdx.x % 8 * 8 - before;
    if (further < Layout::window) {
      const bool present = row < left;
      copy_async(to + row * Layout::long_pitch + further, present ? longer + (token + row) * s.longer + position(further) : longer, present);
    }
  }
}

// parts[split][k][l], as in scalar_gradient. grid: blocks of l, of bands, splits of the tokens. Feature counts: multiples of 8.
template <typename T, int W>
__global__ void __launch_bounds__(gradient_warps * 32, 2)
band_gradient(const T* __restrict__ shorter, const T* __restrict__ longer, const int* __restrict__ offsets, float* __restrict__ parts, Sizes s) {
  using Layout = GradientLayout<W>;
  constexpr int B = gradient_bands<W>, J = W / 8 + 2;
  DST_OPS_SHARED(memory);
  T* stages = reinterpret_cast<T*>(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, l0 = blockIdx.x * gradient_columns;
  const int sub_bands = s.units * (s.band / W), u0 = blockIdx.y * B;
  const int64_t begin = s.tokens * blockIdx.z / gridDim.z, end = s.tokens * (blockIdx.z + 1) / gridDim.z;
  int start[B];
#pragma unroll
  for (int b = 0; b < B; ++b) start[b] = u0 + b < sub_bands ? band_start<W>(offsets, u0 + b, s) : -1;

  float sum[B][2][J][4] = {};
  stage_gradient<T, W>(stages, shorter, longer, start, begin, end, l0, s);
  copies_commit();
  int which = 0;
  for (int64_t token = begin; token < end; token += gradient_tokens, which ^= 1) {
    if (token + gradient_tokens < end)
      stage_gradient<T, W>(stages + (which ^ 1) * Layout::stage, shorter, longer, start, token + gradient_tokens, end, l0, s);
    copies_commit();
    copies_wait<1>();
    __syncthreads();
    const T* shorts = stages + which * Layout::stage + warp * 32;
    const T* longs = stages + which * Layout::stage + gradient_tokens * Layout::short_pitch + warp * 32;
#pragma unroll
    for (int k = 0; k < gradient_tokens; k += 16) {
      // Fragment A: matrices (tokens 0-7, l 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15), each read transposed.
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
        load_matrices_transposed(a[m], shared_address(shorts) + 2 * ((k + lane / 16 * 8 + lane % 8) * Layout::short_pitch + m * 16 + lane / 8 % 2 * 8));
#pragma unroll
      for (int b = 0; b < B; ++b) {
        if (start[b] < 0) continue;
        const T* window = longs + (b * gradient_tokens + k) * Layout::long_pitch;
#pragma unroll
        for (int j = 0; j < 2 * Layout::pairs; j += 2) {
          // Fragment B of two blocks: (tokens 0-7, block j), (8-15, j), (0-7, j + 1), (8-15, j + 1).
          uint32_t q[4];
          load_matrices_transposed(q, shared_address(window) + 2 * ((lane % 16) * Layout::long_pitch + (j + lane / 16) * 8));
#pragma unroll
          for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int block = j + i - 2 * m;  // counted from the 16 positions' own first column
              if (block < 0 || block >= J) continue;
              mma_k16(T(), sum[b][m][block], a[m], q[2 * i], q[2 * i + 1]);
            }
        }
      }
    }
    __syncthreads();
  }
  copies_wait<0>();

  // Sums lie along diagonals: through shared memory, so that what is written is adjacent.
  float* own = reinterpret_cast<float*>(memory) + warp * B * W * 33;
#pragma unroll
  for (int b = 0; b < B; ++b)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int j = 0; j < J; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int l = lane / 4 + e / 2 * 8, diagonal = j * 8 + lane % 4 * 2 + e % 2 - l;
          if (diagonal >= 0 && diagonal < W) own[(b * W + diagonal) * 33 + m * 16 + l] = sum[b][m][j][e];
        }
  __syncwarp();
  const int l = l0 + warp * 32 + lane;
  if (l < s.shorter)
    for (int i = 0; i < B * W; ++i)
      if (u0 + i / W < sub_bands)
        parts[((static_cast<int64_t>(blockIdx.z) * sub_bands + u0) * W + i) * s.shorter + l] = own[i * 33 + lane];
}

}  // namespace dst_ops
