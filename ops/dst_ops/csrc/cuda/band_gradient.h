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

// A thread's part in copying columns [l0, l0 + 256) of 32 tokens of the shorter side and the bands' windows of the longer one, eight lanes
// a line: of four lines those of 4 tokens, which a warp takes, of a window's fifth lines one token. It is the same at every stage: elements
// from a stage's first row to the thread's piece, or none.
template <typename T, int W>
struct GradientCopy {
  static constexpr int none = -1;
  using Layout = GradientLayout<W>;
  int shorts, longs[gradient_bands<W>], fifth[gradient_bands<W>];

  static __device__ __forceinline__ int token() { return thread_again() / 32 * 4; }
  static __device__ __forceinline__ int row() { return thread_again() / 8; }

  __device__ __forceinline__ GradientCopy(const GradientBlock<T>& block, int l0, const Sizes& s) {
    static_assert(gradient_columns == 32 * 8 && gradient_tokens == gradient_warps * 4 && Layout::window + 8 - (W < 64 ? W / 8 : 8) <= 40);
    const int slot = thread_again() % 32, piece = thread_again() % 8;
    shorts = l0 + slot * 8 < s.shorter ? token() * s.shorter + l0 + slot * 8 : none;  // 32 * 2^23 fit
#pragma unroll
    for (int b = 0; b < gradient_bands<W>; ++b) {
      const int column = block.start[b], before = column / 8 % 8;  // l0 is a multiple of 64
      const auto position = [&](int slot) {
        int at = l0 + column + (slot - before) * 8;
        while (at >= s.longer) at -= s.longer;  // more than once around where there are few features
        return at;
      };
      longs[b] = column >= 0 && slot >= before ? token() * s.longer + position(slot) : none;
      fifth[b] = column >= 0 && 32 + piece - before < Layout::window ? row() * s.longer + position(32 + piece) : none;
    }
  }

  // `left` tokens are there, from `first` on. Whole: all are, and all columns of the shorter side.
  template <bool Whole>
  __device__ __forceinline__ void copy(SharedAddress to, const GradientBlock<T>& block, int first, int left, const Sizes& s) const {
    const unsigned slot = thread_again() % 32, at = slot / 8 * 128 + (slot % 8 ^ token() % 8) * 16;
    const T* from = block.shorter + (static_cast<int64_t>(first) * s.shorter + (Whole || shorts != none ? shorts : 0));
    SharedAddress line = to + token() * Layout::short_row + at;
#pragma unroll
    for (int i = 0; i < 4; ++i) copy_async<true>((line ^ i * 16u) + i * Layout::short_row, from + i * s.shorter, Whole || (shorts != none && token() + i < left));
    to += Layout::shorts;
    const T* const longer = block.longer + static_cast<int64_t>(first) * s.longer;
#pragma unroll
    for (int b = 0; b < gradient_bands<W>; ++b, to += Layout::longs) {
      if (longs[b] != none) {
        from = longer + longs[b];
        line = to + token() * Layout::long_row + at;
#pragma unroll
        for (int i = 0; i < 4; ++i) copy_async<true>((line ^ i * 16u) + i * Layout::long_row, from + i * s.longer, Whole || token() + i < left);
      }
      if (fifth[b] != none)
        copy_async<true>(to + row() * Layout::long_row + 4 * 128 + (thread_again() % 8 ^ row() % 8) * 16, longer + fifth[b], Whole || row() < left);
    }
  }
};

// Where a lane's token has a band's columns: of blocks j, even, for the lanes 0-15, and j + 1 for the others.
template <int W>
struct GradientLines {
  SharedAddress first, second;  // the line of block 0; W >= 32: of block 4
  unsigned before;              // of block 0 in its line

  // line: where the window's first line is, with the lane's part of the piece (of W = 8 without lane / 16: its last block has no partner).
  // slot: of block 0 in the window's lines.
  __device__ __forceinline__ GradientLines(SharedAddress line, unsigned slot) : first(line + slot / 8 * 128), second(0), before(slot % 8) {
    if (W >= 32) first ^= before * 16, second = before ? first + 128 : first;  // before is 0 or 4
  }
  __device__ __forceinline__ SharedAddress column(int j) const {
    if (W >= 32) return (j < 4 ? first : j < 8 ? second : first + 128) ^ j % 8 * 16u;
    const unsigned at = j + before + (W == 8 && j + 1 < W / 8 + 4 ? thread_again() / 16 % 2 : 0);
    return (first + (at >= 8 ? 128 : 0)) ^ at % 8 * 16;
  }
};

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
  const GradientCopy<T, W> window(block, l0, s);
  const auto stage = [&](SharedAddress to, int first) {
    const int left = block.tokens - first;
    if (left >= gradient_tokens && l0 + gradient_columns <= s.shorter) window.template copy<true>(to, block, first, left, s);
    else if (left > 0) window.template copy<false>(to, block, first, left, s);
    copies_commit();
  };
  // Where a lane reads a stage: fragment A, matrices (tokens 0-7, l 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15), each read transposed; in the
  // high half fragment B of two blocks: (tokens 0-7, block j), (8-15, j), (0-7, j + 1), (8-15, j + 1).
  const unsigned reads = [] {
    const unsigned lane = thread_again() % 32, warp = thread_again() / 32;
    const unsigned a = (lane / 16 * 8 + lane % 8) * Layout::short_row + warp / 2 * 128 + ((warp % 2 * 4 + lane / 8 % 2) ^ lane % 8) * 16;
    const unsigned b = lane % 16 * Layout::long_row + (lane % 8 ^ (W == 8 ? 0 : lane / 16)) * 16;
    return a + (b << 16);
  }();
  SharedAddress now = shared_address(memory), other = now + Layout::stage;
  stage(now, 0);
  for (int first = 0; first < block.tokens; first += gradient_tokens) {
    stage(other, first + gradient_tokens);
    copies_wait<1>();
    __syncthreads();
    const SharedAddress shorts = now + (again(reads) & 0xffffu), longs = now + Layout::shorts + (again(reads) >> 16);
    const auto lines_of = [&](int b) { return GradientLines<W>(longs, block.start[b] / 8u % 8 + thread_again() / 32 * 4); };
    const GradientLines<W> lines[] = {lines_of(0), lines_of(B - 1)};
#pragma unroll
    for (int k = 0; k < gradient_tokens; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_matrices_transposed(a[m], (shorts ^ m * 32u) + k * Layout::short_row);
#pragma unroll
      for (int b = 0; b < B; ++b) {
        const int start = block.start[b];
        if (start < 0) continue;
#pragma unroll
        for (int j = 0; j < 2 * Layout::pairs; j += 2) {
          uint32_t q[4];
          load_matrices_transposed(q, lines[b].column(j) + (b * Layout::longs + k * Layout::long_row));
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
    const SharedAddress filled = other;
    other = now, now = filled;
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
