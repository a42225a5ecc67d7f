// Products of bands; see band.h. Two ways to have the columns of x at hand:
//
// resident: a block's tokens lie in shared memory with all their features, and its warps go over the rows of the result. x is
//   read once, the weights once for each tile of tokens: for few features, where a tile can have many tokens, or few tokens.
// stream: a block computes 128 tokens x 128 rows, and of each band fetches the window of columns that those rows meet, one
//   while the band before is multiplied. For any number of features.
#pragma once

#include "band.h"
#include "lines.h"

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
    for (int block = lane; block < s.present_blocks; block += 32) copy_async<false>(shared_address(to + block * 8), from + block * 8, present);
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

// A window in shared memory, see lines.h: three lines a row. Bands of 32 begin in the middle of a line or at its start, and so need two
// and a half: the halves of two rows share a line, behind the others of 16 rows. Sizes in bytes.
template <int W>
struct StreamLayout {
  static constexpr int needed = stream_tiles * 8 + W / 8;  // column blocks
  static constexpr bool halves = W == 32;
  static constexpr int row = halves ? 256 : 384, rows16 = halves ? 16 * 320 : 16 * 384, window = stream_tokens / 16 * rows16;
  // Packed weights come with the window, but for the widest bands.
  static constexpr bool with_weights = W < 64;
  static constexpr int weights = with_weights ? stream_tiles * band_quads<W> * 32 * 16 : 0;
  static constexpr int stage = window + weights, bytes = 2 * stage;

  // Of piece 0, from the window's start: of a whole line, of the half one, of a line of the window. before: blocks of the first line
  // that are not the window's.
  static __device__ __forceinline__ unsigned whole(unsigned token, unsigned line) { return token / 16 * rows16 + token % 16 * row + token % 8 * 16 + line * 128; }
  static __device__ __forceinline__ unsigned half(unsigned token) { return token / 16 * rows16 + 16 * row + token % 16 / 2 * 128 + (token % 2 * 4 + token / 2 % 4) * 16; }
  static __device__ __forceinline__ bool is_half(unsigned line, unsigned before) { return halves && line == (before ? 0u : 2u); }
  static __device__ __forceinline__ unsigned line(unsigned token, unsigned line, unsigned before) {
    return is_half(line, before) ? half(token) : whole(token, halves && before ? line - 1 : line);
  }
};
static_assert(StreamLayout<8>::bytes == 108544 && StreamLayout<16>::bytes == 114688 && StreamLayout<32>::bytes == 106496 && StreamLayout<64>::bytes == 98304,
              "routes.py chooses by these");

// Copies a window of x, from column block `first` on; `left` tokens are there. A warp takes the rows of 16 tokens, four at a time,
// eight lanes a line of one. Four rows on, row % 8 differs by 4: pieces lie 64 bytes elsewhere in their line, those of a half, which
// go by row / 2 % 4, 32.
template <typename T, int W>
__device__ __forceinline__ void stage_window(SharedAddress to, const T* x, int first, int left, const BandSizes& s) {
  using Layout = StreamLayout<W>;
  static_assert(Layout::needed + 8 - (W < 64 ? W / 8 : 8) <= 24 && stream_tokens / stream_warps == 16);
  const unsigned thread = thread_again(), before = W == 64 ? 0 : static_cast<unsigned>(first) % 8;
  const int token = thread / 32 * 16 + thread / 8 % 4, piece = thread % 8;
  if (first + Layout::needed <= s.present_blocks && left >= stream_tokens) {
    const T* from = x + (token * s.in + (first - static_cast<int>(before) + piece) * 8);  // 128 * 2^23 fit an int
    const T* half_from = from + (before ? 0 : 2 * 64);
    const SharedAddress half_to = to + (Layout::half(token) ^ piece * 16);
    if (Layout::halves && before) from += 64;
    to += Layout::whole(token, 0) ^ piece * 16;
#pragma unroll
    for (int line = 0; line < (Layout::halves ? 2 : 3); ++line) {
      const int j = line * 8 + piece - static_cast<int>(before);  // block of the window
      if (!Layout::halves && (j < 0 || j >= Layout::needed)) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) copy_async<true>((to ^ i % 2 * 64u) + i * 4 * Layout::row + line * 128, from + i * 4 * s.in + line * 64, true);
    }
    if (Layout::halves && (piece < 4) != (before != 0)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) copy_async<true>((half_to ^ i % 2 * 32u) + i * 2 * 128, half_from + i * 4 * s.in, true);
    }
    return;
  }
#pragma unroll
  for (int line = 0; line < 3; ++line) {
    const int j = line * 8 + piece - static_cast<int>(before);
    if (j < 0 || j >= Layout::needed) continue;
    int block = first + j;
    while (block >= s.blocks) block -= s.blocks;  // more than once around where there are few features
    const bool present = block < s.present_blocks, half = Layout::is_half(line, before);
    const T* from = x + (token * s.in + block * 8);
    const SharedAddress line_to = to + (Layout::line(token, line, before) ^ piece * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      copy_async<true>((i % 2 ? line_to ^ (half ? 32u : 64u) : line_to) + i * (half ? 2 * 128 : 4 * Layout::row), from + i * 4 * s.in, present && token + i * 4 < left);
  }
}

// grid: blocks of rows, fastest, times tiles of tokens: blocks that run together then share tokens, whose rows stay in the L2 cache.
template <typename T, int W, bool Scatter>
__global__ void __launch_bounds__(stream_warps * 32, 2)
band_stream(const T* __restrict__ x, Packed packed, const T* __restrict__ bias, T* __restrict__ y, T* __restrict__ before, BandSizes s, int row_blocks,
            bool with_gelu) {
  constexpr int M = 2;
  constexpr unsigned tile_quads = band_quads<W> * 32;
  using Layout = StreamLayout<W>;
  DST_OPS_SHARED(memory);
  const unsigned warp = threadIdx.x / 32;
  const int first_tile = blockIdx.x % row_blocks * stream_tiles, tile = first_tile + warp / 4;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x / row_blocks) * stream_tokens;
  const auto warp_token = [] { return static_cast<int>(thread_again() / 32 % 4 * 16 * M); };
  const bool works = tile < s.tiles && first_token + warp_token() < s.tokens;
  TileSums<M> sum;
  start_sums<T, M>(sum, bias, tile * band_rows, s);
  await_previous();
  const auto words_of_tile = [&](int band, int tile) {  // of 16 bytes: their number fits an unsigned
    return reinterpret_cast<const uint4*>(packed.words) + static_cast<unsigned>(band * s.tiles + tile) * tile_quads;
  };
  Bands<W, Scatter> bands(packed.starts, first_tile * 8, Layout::needed, s);
  const int left = static_cast<int>(s.tokens - first_token < stream_tokens ? s.tokens - first_token : stream_tokens);  // tokens that are there
  const auto stage_next = [&](int which) {
    const bool more = bands.next(s);
    if (more) {
      const SharedAddress to = shared_address(memory) + which * Layout::stage;
      stage_window<T, W>(to, x + first_token * s.in, bands.first, left, s);
      if (Layout::with_weights) {
        constexpr unsigned threads = stream_warps * 32, all = stream_tiles * tile_quads;
        const unsigned thread = thread_again();
        const uint4* words = words_of_tile(bands.u, first_tile) + thread;
        const auto copy = [&](unsigned i) { copy_async<true>(to + Layout::window + thread * 16 + i * 16, words + i, true); };
        if (first_tile + stream_tiles <= s.tiles) {
#pragma unroll
          for (unsigned i = 0; i < all; i += threads)
            if (i + threads <= all || i + thread < all) copy(i);
        } else {
#pragma unroll 1
          for (unsigned i = 0; i + thread < tile_quads; i += threads) copy(i);
        }
      }
    }
    copies_commit();
    return more;
  };
  bool more = stage_next(0);
  for (int which = 0; more; which ^= 1) {
    const int u = bands.u, before = W == 64 ? 0 : static_cast<unsigned>(bands.first) % 8, first = wrapped(bands.first + static_cast<int>(warp / 4) * 8, s.blocks);
    more = stage_next(which ^ 1);
    copies_wait<1>();
    __syncthreads();
    if (works) {
      const unsigned thread = thread_again();
      const uint4* words = words_of_tile(u, tile) + thread % 32;
      const unsigned char* staged = memory + which * Layout::stage;
      const auto weights = [words, staged, mine = Layout::window + (thread / 128 * tile_quads + thread % 32) * 16](int quad) {
        if constexpr (Layout::with_weights) return load_shared(staged + mine + quad * 32 * 16);
        else return words[quad * 32];
      };
      constexpr int Step = W < 32 ? 1 : W / 8;
      // The two lines that the warp's tile meets.
      const unsigned row = warp_token() + thread % 16, upper = thread / 128;
      SharedAddress line = shared_address(staged) + Layout::whole(row, 0), next_line = line + 128;
      if constexpr (Layout::halves) {
        const SharedAddress half = shared_address(staged) + Layout::half(row), of_tile = line + upper * 128;
        next_line = before ? of_tile : upper ? half : next_line;
        line = before ? (upper ? line : half) : of_tile;
      } else {
        line += upper * 128, next_line += upper * 128;
      }
      const bool whole = whole_band<W>(first, tile, s);
      add_band<T, W, M, false>(
          sum, weights, Layout::rows16 / 16, [&](int j) { return (in_next_line<Step>(j, before) ? next_line : line) ^ piece_bytes<Step>(j, before); },
          [&](int j) { return whole || pair_counts<W, Scatter>(j, first, tile, s); });
    }
    __syncthreads();
  }
  copies_wait<0>();
  if (works) finish_tile<T, M>(y, before, sum, first_token + warp_token(), tile * band_rows, with_gelu, s);
}

}  // namespace dst_ops
