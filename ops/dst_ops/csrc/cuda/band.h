// Bands of 8, 16, 32 or 64 adjacent diagonals that start at a multiple of their width, tensor cores, 16-bit numbers.
//
// Eight rows of the result meet W + 7 columns of a band, which lie in W / 8 + 1 blocks of 8 columns (W a multiple of 8, as
// is every first column). With the tokens on the 16-side of the matrix instruction, the weights on its 8-side, and a k8
// instruction for the odd block, W / (W + 8) of the multiplications are useful: 50, 67, 80, 89 %.
//
// A warp's tile is 64 rows, which meet 8 + W / 8 column blocks. It goes over pairs of them: loads the pair's columns once, and
// multiplies them for each 8 rows that meet both (k16) or one (k8). Weights are packed once a call, each lane's in the order
// in which it needs them; the corners of the parallelogram are zeros.
#pragma once

#include "geometry.h"
#include "numbers.h"

namespace dst_ops {

constexpr int band_rows = 64;  // of the result: a warp's tile, 8 times 8
constexpr int band_warps = 8;

template <int W>
constexpr int band_blocks = W / 8 + 1;  // of 8 columns, met by 8 rows

// Whether rows 8 n, ... of a tile meet its column block `block`.
template <int W>
__host__ __device__ constexpr bool rows_meet(int n, int block) { return block - n >= 0 && block - n < band_blocks<W>; }

// Words that a lane needs for the pairs of blocks before `pair`, and in it for rows before 8 n.
template <int W>
__host__ __device__ constexpr int words_before(int pair, int n) {
  int words = 0;
  for (int block = 0; block < 2 * pair; ++block) words += (block < 7 ? block : 7) - (block - W / 8 > 0 ? block - W / 8 : 0) + 1;
  for (int m = 0; m < n; ++m) words += rows_meet<W>(m, 2 * pair) + rows_meet<W>(m, 2 * pair + 1);
  return words;
}

// Sizes in the units of the band kernels. Computed on the host: as arguments of a kernel they take no registers.
struct BandSizes : Sizes {
  int blocks, present_blocks;  // of 8 columns: of the longer side, of the input
  int tiles, sub_bands;        // of 64 rows; of W diagonals, into which bands are cut
};
template <int W>
BandSizes band_sizes(const Sizes& s) { return {s, s.longer / 8, s.in / 8, (s.out + band_rows - 1) / band_rows, s.units * (s.band / W)}; }

// First column block that rows 8 n, ..., 8 n + 7 of the result meet in a band that starts at diagonal `start`.
template <int W, bool Scatter>
__device__ __forceinline__ int first_block(int n, int start, int blocks) {
  return wrapped(Scatter ? n - start / 8 - W / 8 : n + start / 8, blocks);
}

// Where sub-band u of W diagonals starts; bands of s.band (a multiple of W) diagonals are cut into those.
template <int W>
__device__ __forceinline__ int band_start(const int* offsets, int u, const Sizes& s) {
  const int parts = s.band / W;
  return first_diagonal(offsets, u / parts, s) + u % parts * W;
}

// packed [sub-band][tile of 64 rows][word / 4][lane][word % 4]: a word has two columns of one row, half of fragment B.
template <typename T, int W, bool Scatter>
__global__ void __launch_bounds__(256) band_pack(const T* __restrict__ values, const int* __restrict__ offsets, uint32_t* __restrict__ packed, BandSizes s) {
  constexpr int J = band_blocks<W>;
  const int64_t count = static_cast<int64_t>(s.sub_bands) * s.tiles * 8 * J * 32;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count; i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int lane = i % 32, j = i / 32 % J, n = i / (32 * J) % 8, block = n + j;
    const int64_t tile = i / (32 * J * 8);  // counted over the sub-bands, too
    const int first_row = static_cast<int>(tile % s.tiles) * band_rows + n * 8, row = first_row + lane / 4, u = static_cast<int>(tile / s.tiles);
    const int start = band_start<W>(offsets, u, s);
    float pair_of[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      // Column counted from the first block; which of the band's diagonals crosses the row there, and where along itself.
      const int c = j * 8 + lane % 4 * 2 + e, diagonal = Scatter ? lane / 4 + W - c : c - lane / 4;
      const int at = Scatter ? wrapped(first_row - start - W + c, s.longer) : row;
      const bool present = diagonal >= 0 && diagonal < W && row < s.out && at < s.shorter;
      pair_of[e] = present ? wide(values[(static_cast<int64_t>(u) * W + diagonal) * s.shorter + at]) : 0.0f;
    }
    const int word = words_before<W>(block / 2, n) + (block % 2 && rows_meet<W>(n, block - 1));
    packed[((tile * 2 * J + word / 4) * 32 + lane) * 4 + word % 4] = pair(pair_of[0], pair_of[1], T());
  }
}

template <int M>
using TileSums = float[M][8][4];  // tiles of 16 tokens, of 8 rows; fragment D of the instruction

// Lane t of 4 holds word t of four 8-column rows, one in each w[i]; afterwards it holds the four words of row t.
__device__ __forceinline__ uint4 transpose_quad(uint32_t (&w)[4]) {
  const int t = threadIdx.x & 3;
#pragma unroll
  for (int step = 1; step <= 2; step *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const bool upper = t & step;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? w[i] : w[i + step], step);
      if (upper) w[i] = got; else w[i + step] = got;
    }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// Writes a warp's tile: 16 * M tokens x 64 rows, four 8-row tiles at a time, 16 bytes a lane.
template <typename T, int M, typename F>
__device__ __forceinline__ void store_tile(T* to, TileSums<M>& sum, int64_t first_token, int first_row, const Sizes& s, const F& of) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n0 = 0; n0 < 8; n0 += 4) {
        uint32_t w[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) w[n] = pair(of(sum[m][n0 + n][2 * half]), of(sum[m][n0 + n][2 * half + 1]), T());
        const uint4 q = transpose_quad(w);
        const int64_t token = first_token + m * 16 + half * 8 + lane / 4;
        const int row = first_row + (n0 + lane % 4) * 8;
        if (token < s.tokens && row < s.out) *reinterpret_cast<uint4*>(to + token * s.out + row) = q;
      }
}

template <typename T, int M>
__device__ __forceinline__ void start_sums(TileSums<M>& sum, const T* bias, int first_row, const Sizes& s) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = first_row + n * 8 + lane % 4 * 2 + e % 2;
      const float b = bias && row < s.out ? wide(bias[row]) : 0.0f;
#pragma unroll
      for (int m = 0; m < M; ++m) sum[m][n][e] = b;
    }
}

// Whether column blocks j and j + 1 of a tile, counted from block `first`, are met by rows of the result and lie in the input.
template <int W, bool Scatter>
__device__ __forceinline__ bool pair_counts(int j, int first, int tile, const BandSizes& s) {
  return j - W / 8 < (s.out - tile * band_rows) / 8 && (!Scatter || meets(wrapped(first + j, s.blocks), 2, s.present_blocks, s.blocks));
}

// Adds the products with one pair of column blocks, whose columns are in a.
template <typename T, int W, int M, int Pair>
__device__ __forceinline__ void add_pair(TileSums<M>& sum, const uint32_t (&a)[M][4], const uint4* weights) {
  constexpr int first = words_before<W>(Pair, 0), begin = first / 4, end = (words_before<W>(Pair + 1, 0) + 3) / 4;
  uint32_t b[4 * (end - begin)];
#pragma unroll
  for (int q = 0; q < end - begin; ++q) {
    const uint4 w = weights[(begin + q) * 32];
    b[4 * q] = w.x, b[4 * q + 1] = w.y, b[4 * q + 2] = w.z, b[4 * q + 3] = w.w;
  }
  int word = first - 4 * begin;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const bool both = rows_meet<W>(n, 2 * Pair) && rows_meet<W>(n, 2 * Pair + 1);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (both) mma_k16(T(), sum[m][n], a[m], b[word], b[word + 1]);
      else if (rows_meet<W>(n, 2 * Pair)) mma_k8(T(), sum[m][n], a[m][0], a[m][1], b[word]);
      else if (rows_meet<W>(n, 2 * Pair + 1)) mma_k8(T(), sum[m][n], a[m][2], a[m][3], b[word]);
    }
    word += rows_meet<W>(n, 2 * Pair) + rows_meet<W>(n, 2 * Pair + 1);
  }
}

// Adds a sub-band to a warp's tile, from one pair of column blocks on. weights: the lane's, of the tile. column(block): where
// the 8 columns of the lane's token in a block lie, counted from the first that the tile meets; lanes 0-15 are asked for a
// pair's first, the others for its second. pitch: bytes to the next token. counts(block): whether to multiply the pair that
// begins there.
template <typename T, int W, int M, int Pair = 0, typename Column, typename Counts>
__device__ __forceinline__ void add_band(TileSums<M>& sum, const uint4* weights, int pitch, const Column& column, const Counts& counts) {
  if (counts(2 * Pair)) {
    const SharedAddress at = column(2 * Pair + (threadIdx.x & 31) / 16);
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_matrices(a[m], at + m * 16 * pitch);
    add_pair<T, W, M, Pair>(sum, a, weights);
  }
  if constexpr (2 * Pair + 2 < 8 + W / 8) add_band<T, W, M, Pair + 1>(sum, weights, pitch, column, counts);
}

// Applies the epilogue and writes.
template <typename T, int M>
__device__ __forceinline__ void finish_tile(T* y, T* before, TileSums<M>& sum, int64_t first_token, int first_row, bool with_gelu, const Sizes& s) {
  if (before) store_tile<T, M>(before, sum, first_token, first_row, s, [](float v) { return v; });
  store_tile<T, M>(y, sum, first_token, first_row, s, [with_gelu](float v) { return with_gelu ? gelu(v) : v; });
}

}  // namespace dst_ops
