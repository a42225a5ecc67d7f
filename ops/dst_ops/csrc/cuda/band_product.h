// Products of bands; see band.h. Two ways to have the columns of x at hand:
//
// resident: a block's tokens lie in shared memory with all their features, and its warps go over the rows of the result. x is
//   read once, the weights once for each tile of tokens: for few features, where a tile can have many tokens, or few tokens.
// stream: a block computes 128 tokens x 128 rows, and of each band fetches the window of columns that those rows meet, one
//   while the band before is multiplied. For any number of features.
#pragma once

#include "band.h"

namespace dst_ops {

// Elements from a token to the next in shared memory, with room for so many blocks of 8 columns: an odd number of 16-byte
// pieces, so that the rows of a matrix meet different banks.
__host__ __device__ constexpr int band_pitch(int blocks) { return (blocks | 1) * 8; }

// grid: tiles of 16 * M * token_warps tokens, blocks of rows. s.in, s.out: multiples of 8.
template <typename T, int W, int M, bool Scatter>
__global__ void __launch_bounds__(band_warps * 32, 2)
band_resident(const T* __restrict__ x, const uint4* __restrict__ packed, const int* __restrict__ offsets, const T* __restrict__ bias,
              T* __restrict__ y, T* __restrict__ before, BandSizes s, int pitch, int token_warps, bool with_gelu) {
  constexpr int J = band_blocks<W>;
  DST_OPS_SHARED(memory);
  T* xs = reinterpret_cast<T*>(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, row_warps = band_warps / token_warps;
  const int staged = s.present_blocks + 1;  // the last of zeros
  const int tile_tokens = 16 * M * token_warps;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * tile_tokens;
  for (int i = threadIdx.x; i < tile_tokens * staged; i += blockDim.x) {
    const int token = i / staged, block = i % staged;
    const bool present = first_token + token < s.tokens && block < s.present_blocks;
    copy_async(xs + token * pitch + block * 8, present ? x + (first_token + token) * s.in + block * 8 : x, present);
  }
  copies_commit();
  copies_wait<0>();
  __syncthreads();

  const int warp_token = warp % token_warps * 16 * M;
  const SharedAddress lane_row = shared_address(xs + (warp_token + lane % 16) * pitch);
  for (int tile = blockIdx.y * row_warps + warp / token_warps; tile < s.tiles; tile += gridDim.y * row_warps) {
    TileSums<M> sum;
    start_sums<T, M>(sum, bias, tile * band_rows, s);
    for (int u = 0; u < s.sub_bands; ++u) {
      const int first = first_block<W, Scatter>(tile * 8, band_start<W>(offsets, u, s), s.blocks);
      if (Scatter && !meets(first, 8 + W / 8, s.present_blocks, s.blocks)) continue;
      const uint4* weights = packed + (static_cast<int64_t>(u) * s.tiles + tile) * 2 * J * 32 + lane;
      add_band<T, W, M>(
          sum, weights, pitch * 2,
          [&](int j) {
            const int block = wrapped(first + j, s.blocks);
            return lane_row + (!Scatter || block < s.present_blocks ? block : s.present_blocks) * 16;
          },
          [&](int j) { return pair_counts<W, Scatter>(j, first, tile, s); });
    }
    finish_tile<T, M>(y, before, sum, first_token + warp_token, tile * band_rows, with_gelu, s);
  }
}

constexpr int stream_tokens = 128, stream_tiles = 2;  // a block: 4 warps along the tokens, 2 tiles of 64 rows

template <int W>
struct StreamLayout {
  static constexpr int blocks = stream_tiles * 8 + (W / 8 + 1) / 2 * 2, pitch = band_pitch(blocks), stage = stream_tokens * pitch, bytes = 2 * stage * 2;
};

// The first sub-band from u on that the block's rows meet.
template <int W, bool Scatter>
__device__ __forceinline__ int next_band(const int* offsets, int u, int first_n, const BandSizes& s) {
  if (Scatter)
    while (u < s.sub_bands && !meets(first_block<W, Scatter>(first_n, band_start<W>(offsets, u, s), s.blocks), StreamLayout<W>::blocks, s.present_blocks, s.blocks)) ++u;
  return u;
}

template <typename T, int W>
__device__ __forceinline__ void stage_window(T* to, const T* x, int first, int64_t first_token, const BandSizes& s) {
  using Layout = StreamLayout<W>;
  for (int i = threadIdx.x; i < stream_tokens * Layout::blocks; i += blockDim.x) {
    const int token = i / Layout::blocks, j = i % Layout::blocks;
    int block = first + j;
    while (block >= s.blocks) block -= s.blocks;  // more than once around where there are few features
    const bool present = first_token + token < s.tokens && block < s.present_blocks;
    copy_async(to + token * Layout::pitch + j * 8, present ? x + (first_token + token) * s.in + block * 8 : x, present);
  }
}

// grid: blocks of rows, fastest, times tiles of tokens: blocks that run together then share tokens, whose rows stay in the L2 cache.
template <typename T, int W, bool Scatter>
__global__ void __launch_bounds__(band_warps * 32, 2)
band_stream(const T* __restrict__ x, const uint4* __restrict__ packed, const int* __restrict__ offsets, const T* __restrict__ bias,
            T* __restrict__ y, T* __restrict__ before, BandSizes s, int row_blocks, bool with_gelu) {
  constexpr int J = band_blocks<W>, M = 2;
  using Layout = StreamLayout<W>;
  DST_OPS_SHARED(memory);
  T* stages = reinterpret_cast<T*>(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, first_tile = blockIdx.x % row_blocks * stream_tiles, tile = first_tile + warp / 4;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x / row_blocks) * stream_tokens;
  const int warp_token = warp % 4 * 16 * M;
  TileSums<M> sum;
  start_sums<T, M>(sum, bias, tile * band_rows, s);
  int u = next_band<W, Scatter>(offsets, 0, first_tile * 8, s);
  auto stage = [&](int band, int which) {
    if (band < s.sub_bands)
      stage_window<T, W>(stages + which * Layout::stage, x, first_block<W, Scatter>(first_tile * 8, band_start<W>(offsets, band, s), s.blocks), first_token, s);
    copies_commit();
  };
  stage(u, 0);
  for (int which = 0; u < s.sub_bands; which ^= 1) {
    const int following = next_band<W, Scatter>(offsets, u + 1, first_tile * 8, s);
    stage(following, which ^ 1);
    copies_wait<1>();
    __syncthreads();
    if (tile < s.tiles) {
      const int first = first_block<W, Scatter>(tile * 8, band_start<W>(offsets, u, s), s.blocks);
      const uint4* weights = packed + (static_cast<int64_t>(u) * s.tiles + tile) * 2 * J * 32 + lane;
      const SharedAddress lane_row = shared_address(stages + which * Layout::stage + (warp_token + lane % 16) * Layout::pitch + warp / 4 * 64);
      add_band<T, W, M>(
          sum, weights, Layout::pitch * 2, [&](int j) { return lane_row + j * 16; },
          [&](int j) { return pair_counts<W, Scatter>(j, first, tile, s); });
    }
    __syncthreads();
    u = following;
  }
  copies_wait<0>();
  if (tile < s.tiles) finish_tile<T, M>(y, before, sum, first_token + warp_token, tile * band_rows, with_gelu, s);
}

}  // namespace dst_ops
