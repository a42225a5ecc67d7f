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

constexpr int resident_warps = 8;

// grid: tiles of 16 * M * token_warps tokens, blocks of rows. s.in, s.out: multiples of 8.
template <typename T, int W, int M, bool Scatter>
__global__ void __launch_bounds__(resident_warps * 32, 2)
band_resident(const T* __restrict__ x, Packed packed, const T* __restrict__ bias, T* __restrict__ y, T* __restrict__ before, BandSizes s, int pitch,
              int token_warps, bool with_gelu) {
  DST_OPS_SHARED(memory);
  T* xs = reinterpret_cast<T*>(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, row_warps = resident_warps / token_warps;
  const int tile_tokens = 16 * M * token_warps;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * tile_tokens;
  for (int token = warp; token < tile_tokens; token += resident_warps) {
    const bool present = first_token + token < s.tokens;
    const T* from = x + (first_token + (present ? token : 0)) * s.in;
    T* to = xs + token * pitch;
    for (int block = lane; block < s.present_blocks; block += 32) copy_async(to + block * 8, from + block * 8, present);
    if (lane == 0) *reinterpret_cast<uint4*>(to + s.present_blocks * 8) = make_uint4(0, 0, 0, 0);  // for blocks that are not there
  }
  copies_commit();
  await_previous();
  copies_wait<0>();
  __syncthreads();

  const int warp_token = warp % token_warps * 16 * M;
  const SharedAddress lane_row = shared_address(xs + (warp_token + lane % 16) * pitch);
  for (int tile = blockIdx.y * row_warps + warp / token_warps; tile < s.tiles; tile += gridDim.y * row_warps) {
    TileSums<M> sum;
    start_sums<T, M>(sum, bias, tile * band_rows, s);
    Bands<W, Scatter> bands(packed.starts, tile * 8, 8 + W / 8, s);
    while (bands.next(s)) {
      const int first = bands.first;
      const uint4* words = reinterpret_cast<const uint4*>(packed.words) + (static_cast<int64_t>(bands.u) * s.tiles + tile) * (band_quads<W> * 32) + lane;
      const auto weights = [words](int quad) { return words[quad * 32]; };
      const bool whole = whole_band<W>(first, tile, s);
      add_band<T, W, M, true>(
          sum, weights, pitch * 2,
          [&](int j) {
            int block = first + j;
            if (!whole) {
              block = wrapped(block, s.blocks);
              if (Scatter && block >= s.present_blocks) block = s.present_blocks;
            }
            return lane_row + block * 16;
          },
          [&](int j) { return whole || pair_counts<W, Scatter>(j, first, tile, s); });
    }
    finish_tile<T, M>(y, before, sum, first_token + warp_token, tile * band_rows, with_gelu, s);
  }
}

constexpr int stream_warps = 8, stream_tokens = 128, stream_tiles = 2;  // a block: 4 warps along the tokens, 2 tiles of 64 rows

constexpr int line_slots = 24;  // blocks of 8 columns in the three lines of 128 bytes that hold a window

template <int W>
struct StreamLayout {
  // Blocks of a window, and with the one that only completes a pair and is not multiplied.
  static constexpr int needed = stream_tiles * 8 + W / 8, blocks = (needed + 1) / 2 * 2;
  static constexpr int pitch = band_pitch(blocks), window = stream_tokens * pitch;
  // Packed weights come with the window, but for the widest bands: two blocks would not fit a multiprocessor.
  static constexpr bool with_weights = W < 64;
  static constexpr int weights = with_weights ? stream_tiles * band_quads<W> * 32 * 8 : 0;  // elements of 2 bytes
  static constexpr int stage = window + weights, bytes = 2 * stage * 2;
};
static_assert(StreamLayout<8>::bytes == 88064 && StreamLayout<16>::bytes == 94208 && StreamLayout<32>::bytes == 110592 && StreamLayout<64>::bytes == 102400,
              "routes.py chooses by these");

// Copies a window of x, from column block `first` on. A warp takes the rows of 16 tokens, eight lanes a line of 128 bytes of one.
template <typename T, int W>
__device__ __forceinline__ void stage_window(T* to, const T* x, int first, int64_t first_token, const BandSizes& s) {
  using Layout = StreamLayout<W>;
  constexpr int rows = stream_tokens / stream_warps, turn = 4;  // after so many rows lanes have the same columns
  static_assert(Layout::needed + 8 - (W < 64 ? W / 8 : 8) <= line_slots && turn * line_slots % 32 == 0 && rows % turn == 0);
  const int thread = thread_again(), lane = thread % 32, first_row = thread / 32 * rows, before = first % 8;
  const int left = static_cast<int>(s.tokens - first_token < stream_tokens ? s.tokens - first_token : stream_tokens);  // tokens that are there
  const T* from = x + first_token * s.in;
  if (first + Layout::needed <= s.present_blocks && left == stream_tokens) {
    from += first * 8;
#pragma unroll 1  // so that there are registers for the addresses
    for (int i = lane; i < turn * line_slots; i += 32) {
      const int token = first_row + i / line_slots, j = i % line_slots - before;
      if (j < 0 || j >= Layout::needed) continue;
      T* line = to + token * Layout::pitch + j * 8;
      const T* piece = from + (token * s.in + j * 8);  // 128 * 2^23 fit an int
#pragma unroll
      for (int more = 0; more < rows; more += turn, piece += turn * s.in) copy_async(line + more * Layout::pitch, piece, true);
    }
    return;
  }
#pragma unroll 1
  for (int i = lane; i < rows * line_slots; i += 32) {
    const int token = first_row + i / line_slots, j = i % line_slots - before;
    int block = first + j;
    if (j < 0 || j >= Layout::needed) continue;
    while (block >= s.blocks) block -= s.blocks;  // more than once around where there are few features
    const bool present = token < left && block < s.present_blocks;
    copy_async(to + token * Layout::pitch + j * 8, present ? from + (token * s.in + block * 8) : x, present);
  }
}

// grid: blocks of rows, fastest, times tiles of tokens: blocks that run together then share tokens, whose rows stay in the L2 cache.
template <typename T, int W, bool Scatter>
__global__ void __launch_bounds__(stream_warps * 32, 2)
band_stream(const T* __restrict__ x, Packed packed, const T* __restrict__ bias, T* __restrict__ y, T* __restrict__ before, BandSizes s, int row_blocks,
            bool with_gelu) {
  constexpr int M = 2, tile_quads = band_quads<W> * 32;
  using Layout = StreamLayout<W>;
  DST_OPS_SHARED(memory);
  T* stages = reinterpret_cast<T*>(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, first_tile = blockIdx.x % row_blocks * stream_tiles, tile = first_tile + warp / 4;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x / row_blocks) * stream_tokens;
  const int warp_token = warp % 4 * 16 * M;
  const bool works = tile < s.tiles && first_token + warp_token < s.tokens;
  TileSums<M> sum;
  start_sums<T, M>(sum, bias, tile * band_rows, s);
  await_previous();
  const auto words_of_tile = [&](int band, int tile) { return reinterpret_cast<const uint4*>(packed.words) + (static_cast<int64_t>(band) * s.tiles + tile) * tile_quads; };
  Bands<W, Scatter> bands(packed.starts, first_tile * 8, Layout::needed, s);
  const auto stage_next = [&](int which) {
    const bool more = bands.next(s);
    if (more) {
      T* to = stages + which * Layout::stage;
      stage_window<T, W>(to, x, bands.first, first_token, s);
      if (Layout::with_weights) {
        const int quads = min(stream_tiles, s.tiles - first_tile) * tile_quads;
        const uint4* words = words_of_tile(bands.u, first_tile);
        for (int i = thread_again(); i < quads; i += stream_warps * 32) copy_async(to + Layout::window + i * 8, words + i, true);
      }
    }
    copies_commit();
    return more;
  };
  bool more = stage_next(0);
  for (int which = 0; more; which ^= 1) {
    const int u = bands.u, first = wrapped(bands.first + warp / 4 * 8, s.blocks);
    more = stage_next(which ^ 1);
    copies_wait<1>();
    __syncthreads();
    if (works) {
      const uint4* words = words_of_tile(u, tile) + lane;
      const T* staged = stages + which * Layout::stage + Layout::window + (warp / 4 * tile_quads + lane) * 8;
      const auto weights = [words, staged](int quad) {
        if constexpr (Layout::with_weights) return load_shared(staged + quad * 32 * 8);
        else return words[quad * 32];
      };
      const SharedAddress lane_row = shared_address(stages + which * Layout::stage + (warp_token + lane % 16) * Layout::pitch + warp / 4 * 64);
      const bool whole = whole_band<W>(first, tile, s);
      add_band<T, W, M, false>(
          sum, weights, Layout::pitch * 2, [&](int j) { return lane_row + j * 16; },
          [&](int j) { return whole || pair_counts<W, Scatter>(j, first, tile, s); });
    }
    __syncthreads();
  }
  copies_wait<0>();
  if (works) finish_tile<T, M>(y, before, sum, first_token + warp_token, tile * band_rows, with_gelu, s);
}

}  // namespace dst_ops
