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

// A stage in shared memory, see band.h: four lines of each of the shorter side's rows, five of each window's. Sizes in bytes.
template <int W>
struct GradientLayout {
  static constexpr int window = gradient_columns / 8 + W / 8;  // column blocks
  static constexpr int pairs = (W / 8 + 5) / 2;  // of blocks that a warp reads; for W = 8 one block more than the window has
  static constexpr int short_row = 4 * 128, long_row = 5 * 128, shorts = gradient_tokens * short_row, longs = gradient_tokens * long_row;
  static constexpr int stage = shorts + gradient_bands<W> * longs;
  static constexpr int sums = gradient_warps * gradient_bands<W> * W * 33 * 4;  // reuses the stages' memory
  static constexpr int block = 2 * stage, bytes = block + 32;
  static_assert(bytes >= sums && (W == 8 || 2 * pairs <= W / 8 + 4));
};
static_assert(GradientLayout<8>::bytes == 114720 && GradientLayout<16>::bytes == 114720 && GradientLayout<32>::bytes == 114720 && GradientLayout<64>::bytes == 73760,
              "routes.py chooses by these");

// What a block computes, in shared memory, since the sums leave hardly a register: where its tokens begin, their number; of each band
// the first diagonal, -1 if there is none.
template <typename T>
struct GradientBlock {
  const T *shorter, *longer;
  int tokens, start[2];
};

// Copies columns [l0, l0 + 256) of 32 tokens of the shorter side, from `first` on, and the bands' windows of the longer one, eight lanes
// a line. `left` tokens are there. Whole: all tokens and columns are, and no window goes round more than once.
template <typename T, int W, bool Whole>
__device__ __forceinline__ void stage_gradient(SharedAddress to, const GradientBlock<T>& block, int first, int left, int l0, const Sizes& s) {
  using Layout = GradientLayout<W>;
  static_assert(gradient_columns == 32 * 8 && gradient_tokens == gradient_warps * 4 && Layout::window + 8 - (W < 64 ? W / 8 : 8) <= 40);
  // A warp takes 4 tokens; windows' fifth lines are shared out by eight threads.
  const unsigned thread = thread_again(), slot = thread % 32, row = thread / 8, piece = thread % 8;
  const int token = thread / 32 * 4;
  const unsigned at = slot / 8 * 128 + (slot % 8 ^ token % 8u) * 16;
  const T* from = block.shorter + (static_cast<int64_t>(first + token) * s.shorter + l0 + static_cast<int>(slot) * 8);
  const bool inside = Whole || l0 + static_cast<int>(slot) * 8 < s.shorter;
  SharedAddress line = to + token * Layout::short_row + at;
#pragma unroll
  for (int i = 0; i < 4; ++i) copy_async<true>((line ^ i * 16u) + i * Layout::short_row, from + i * s.shorter, Whole || (inside && token + i < left));
  to += Layout::shorts;
#pragma unroll
  for (int b = 0; b < gradient_bands<W>; ++b, to += Layout::longs) {
    const int column = block.start[b];
    if (column < 0) continue;
    const unsigned before = column / 8u % 8;  // l0 is a multiple of 64
    const auto position = [&](unsigned slot) {
      int at = l0 + column + static_cast<int>((slot - before) * 8);
      if (at >= s.longer) at -= s.longer;
      while (!Whole && at >= s.longer) at -= s.longer;  // more than once around where there are few features
      return at;
    };
    if (W == 64 || slot >= before) {
      from = block.longer + (static_cast<int64_t>(first + token) * s.longer + position(slot));
      line = to + token * Layout::long_row + at;
#pragma unroll
      for (int i = 0; i < 4; ++i) copy_async<true>((line ^ i * 16u) + i * Layout::long_row, from + i * s.longer, Whole || token + i < left);
    }
    if (W == 64 || 32 + piece - before < Layout::window)
      copy_async<true>(to + row * Layout::long_row + 4 * 128 + (piece ^ row % 8) * 16, block.longer + (static_cast<int64_t>(first + static_cast<int>(row)) * s.longer + position(32 + piece)), Whole || static_cast<int>(row) < left);
  }
}

// Where a lane's token has column blocks j, of the lanes 0-15, and j + 1, of the others, counted from block `slot` of the window's lines; j is
// even. line: where it has block 0 of the lines, with the lane's part of the piece (of W = 8 without lane / 16: its last block has no partner).
template <int W>
__device__ __forceinline__ auto columns_of(SharedAddress line, unsigned slot) {
  line += slot / 8 * 128;
  const unsigned before = slot % 8;
  if constexpr (W >= 32) {  // 0 or 4
    const SharedAddress first = line ^ before * 16, second = before ? first + 128 : first;
    return [first, second](int j) -> SharedAddress { return (j < 4 ? first : j < 8 ? second : first + 128) ^ j % 8 * 16u; };
  } else {
    return [line, before](int j) -> SharedAddress {
      const unsigned at = j + before + (W == 8 && j + 1 < W / 8 + 4 ? thread_again() / 16 % 2 : 0);
      return (line + (at >= 8 ? 128 : 0)) ^ at % 8 * 16;
    };
  }
}

// parts[split][k][l], as in scalar_gradient. grid: blocks of l, of bands, splits of the tokens. Feature counts: multiples of 8.
template <typename T, int W>
__global__ void __launch_bounds__(gradient_warps * 32, 2)
band_gradient(const T* __restrict__ shorter, const T* __restrict__ longer, const int* __restrict__ offsets, float* __restrict__ parts, Sizes s) {
  using Layout = GradientLayout<W>;
  constexpr int B = gradient_bands<W>, J = W / 8 + 2;
  DST_OPS_SHARED(memory);
  const int l0 = blockIdx.x * gradient_columns;
  const int sub_bands = s.units * (s.band / W), u0 = blockIdx.y * B;
  const int64_t begin = s.tokens * blockIdx.z / gridDim.z, end = s.tokens * (blockIdx.z + 1) / gridDim.z;
  GradientBlock<T>& block = *reinterpret_cast<GradientBlock<T>*>(memory + Layout::block);
  if (threadIdx.x < B) block.start[threadIdx.x] = u0 + static_cast<int>(threadIdx.x) < sub_bands ? band_start<W>(offsets, u0 + threadIdx.x, s) : -1;
  if (threadIdx.x == 0) block.shorter = shorter + begin * s.shorter, block.longer = longer + begin * s.longer, block.tokens = static_cast<int>(end - begin);
  __syncthreads();

  float sum[B][2][J][4] = {};
  const auto stage_at = [&](int which) { return shared_address(memory) + which * Layout::stage; };
  const auto stage = [&](int which, int first) {
    const int tokens = block.tokens;
    const bool whole = first + gradient_tokens <= tokens && l0 + gradient_columns <= s.shorter && s.longer >= gradient_columns + W;
    if (whole) stage_gradient<T, W, true>(stage_at(which), block, first, gradient_tokens, l0, s);
    else if (first < tokens) stage_gradient<T, W, false>(stage_at(which), block, first, tokens - first, l0, s);
    copies_commit();
  };
  stage(0, 0);
  for (int first = 0, which = 0; first < block.tokens; first += gradient_tokens, which ^= 1) {
    stage(which ^ 1, first + gradient_tokens);
    copies_wait<1>();
    __syncthreads();
    const unsigned lane = thread_again() % 32, warp = thread_again() / 32;
    // Fragment A: matrices (tokens 0-7, l 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15), each read transposed.
    const SharedAddress shorts = stage_at(which) + (lane / 16 * 8 + lane % 8) * Layout::short_row + warp / 2 * 128 + ((warp % 2 * 4 + lane / 8 % 2) ^ lane % 8) * 16;
    // Fragment B of two blocks: (tokens 0-7, block j), (8-15, j), (0-7, j + 1), (8-15, j + 1).
    const SharedAddress longs = stage_at(which) + Layout::shorts + lane % 16 * Layout::long_row + (lane % 8 ^ (W == 8 ? 0 : lane / 16)) * 16;
#pragma unroll
    for (int k = 0; k < gradient_tokens; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_matrices_transposed(a[m], (shorts ^ m * 32u) + k * Layout::short_row);
#pragma unroll
      for (int b = 0; b < B; ++b) {
        const int start = block.start[b];
        if (start < 0) continue;
        const auto column = columns_of<W>(longs, start / 8u % 8 + warp * 4);
#pragma unroll
        for (int j = 0; j < 2 * Layout::pairs; j += 2) {
          uint32_t q[4];
          load_matrices_transposed(q, column(j) + (b * Layout::longs + k * Layout::long_row));
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
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
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
