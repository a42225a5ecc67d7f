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
    for (int block = lane; block < s.present_blocks; block += 32) copy_async<false>(shared_address(to + block * 8), from + block * 8, present);
    if (lane == 0) *reinterpret_cast<uint4*>(to + s.present_blocks * 8) = make_uint4(0, 0, 0, 0);  // for blocks that are not there
  }
  copies_commit();
  await_previous();
  copies_wait<0>();
  __syncthreads();

  const auto warp_token = [=] { return static_cast<int>(thread_again() / 32) % token_warps * 16 * M; };
  const SharedAddress lane_row = shared_address(xs + (warp_token() + lane % 16) * pitch) + lane / 16 * 16;
  for (int tile = blockIdx.y * row_warps + warp / token_warps; tile < s.tiles; tile += gridDim.y * row_warps) {
    TileSums<M> sum;
    start_sums<T, M>(sum, bias, tile * band_rows, s);
    Bands<W, Scatter> bands(packed.starts, tile * 8, 8 + W / 8, s);
    while (bands.next(s)) {
      const int first = bands.first;
      const uint4* words = reinterpret_cast<const uint4*>(packed.words) + (static_cast<int64_t>(bands.u) * s.tiles + tile) * (band_quads<W> * 32) + lane;
      const auto weights = [words](int quad) { return words[quad * 32]; };
      const bool whole = first <= last_whole<W>(tile, s);
      const unsigned counting = whole ? ~0u : pairs_that_count<W, Scatter>(first, tile, s);
      add_band<T, W, M, true>(
          sum, weights, pitch * 2,
          [&](int j) {
            if (whole) return lane_row + (first + j) * 16;
            const int second = static_cast<int>(thread_again() % 32 / 16), block = wrapped(first + j + second, s.blocks);
            return lane_row + ((Scatter && block >= s.present_blocks ? s.present_blocks : block) - second) * 16;
          },
          [counting](int j) { return counting >> j / 2 & 1; });
    }
    // Computed for each tile: registers would not hold it over the loop.
    const SharedAddress own = shared_address(memory) + 16 * M * token_warps * pitch * 2 + thread_again() / 32 * store_bytes;
    const int64_t first_own = static_cast<int64_t>(again(blockIdx.x)) * (16 * M * token_warps) + warp_token();
    finish_tile<T, M>(y, before, sum, own, first_own, tile * band_rows, with_gelu, s);
  }
}

constexpr unsigned most_blocks_in_y = 65535;
constexpr int stream_warps = 8, stream_tokens = 128, stream_tiles = 2;  // a block: 4 warps along the tokens, 2 tiles of 64 rows

// A window in shared memory, see band.h: three lines a row. Bands of 32 begin in the middle of a line or at its start, and so need two
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

// A thread's part in copying windows: a warp takes the rows of 16 tokens, four at a time, eight lanes a line of one. Four rows on, row % 8
// differs by 4: pieces lie 64 bytes elsewhere in their line, those of a half, which go by row / 2 % 4, 32.
template <typename T, int W>
struct WindowCopy {
  using Layout = StreamLayout<W>;
  const T* tokens;  // the block's in x
  int from;         // elements to the thread's piece of its first row's first line
  unsigned to;      // bytes from a window's start to that piece of a whole line; in the high half, of a half one

  static __device__ __forceinline__ unsigned token() { return thread_again() / 32 * 16 + thread_again() / 8 % 4; }
  __device__ __forceinline__ WindowCopy(const T* tokens, const BandSizes& s) : tokens(tokens) {
    const unsigned piece = thread_again() % 8;
    from = static_cast<int>(token()) * s.in + static_cast<int>(piece) * 8;  // 128 * 2^23 fit
    to = Layout::whole(token(), 0) ^ piece * 16;
    if (Layout::halves) to += (Layout::half(token()) ^ piece * 16) << 16;
  }

  // Of bands of 32 whose window begins at a line's second half, or at its first: the whole lines, then the half one.
  template <bool Second>
  __device__ __forceinline__ void copy_with_half(SharedAddress stage, const T* row, const BandSizes& s) const {
    const SharedAddress whole = stage + (again(to) & 0xffffu), half = stage + (again(to) >> 16);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int line = 0; line < 2; ++line) copy_async<true>((whole ^ i % 2 * 64u) + i * 4 * Layout::row + line * 128, row + i * 4 * s.in + (line + Second) * 64, true);
    if ((thread_again() % 8 < 4) != Second) {
#pragma unroll
      for (int i = 0; i < 4; ++i) copy_async<true>((half ^ i % 2 * 32u) + i * 2 * 128, row + i * 4 * s.in + (Second ? 0 : 128), true);
    }
  }

  // Column blocks from `first` on; `left` tokens are there.
  __device__ __forceinline__ void copy(SharedAddress stage, int first, int left, const BandSizes& s) const {
    static_assert(Layout::needed + 8 - (W < 64 ? W / 8 : 8) <= 24 && stream_tokens / stream_warps == 16);
    const int before = W == 64 ? 0 : static_cast<int>(static_cast<unsigned>(first) % 8);
    if (first + Layout::needed <= s.present_blocks && left >= stream_tokens) {
      const T* row = tokens + (from + (first - before) * 8);
      if constexpr (Layout::halves) {
        if (before) copy_with_half<true>(stage, row, s);
        else copy_with_half<false>(stage, row, s);
      } else {
        const int piece = thread_again() % 8;
        const SharedAddress whole = stage + to;
#pragma unroll
        for (int line = 0; line < 3; ++line) {
          const int j = line * 8 + piece - before;  // block of the window
          if (j < 0 || j >= Layout::needed) continue;
#pragma unroll
          for (int i = 0; i < 4; ++i) copy_async<true>((whole ^ i % 2 * 64u) + i * 4 * Layout::row + line * 128, row + i * 4 * s.in + line * 64, true);
        }
      }
      return;
    }
    const int piece = thread_again() % 8;
#pragma unroll 1
    for (int line = 0; line < 3; ++line) {
      const int j = line * 8 + piece - before;
      if (j < 0 || j >= Layout::needed) continue;
      int block = first + j;
      while (block >= s.blocks) block -= s.blocks;  // more than once around where there are few features
      const bool present = block < s.present_blocks, half = Layout::is_half(line, before);
      const T* row = tokens + (from + (block - piece) * 8);
      const SharedAddress line_to = stage + (Layout::line(token(), line, before) ^ piece * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        copy_async<true>((i % 2 ? line_to ^ (half ? 32u : 64u) : line_to) + i * (half ? 2 * 128 : 4 * Layout::row), row + i * 4 * s.in, present && static_cast<int>(token()) + i * 4 < left);
    }
  }
};

// Where a lane of a warp finds its token's columns that the warp's tile meets: the line in which they begin and the next. Of a pair of blocks
// lanes 0-15 read the first, the others the second.
template <int W>
struct WindowLines {
  using Layout = StreamLayout<W>;
  unsigned packed[Layout::halves ? 2 : 1];  // bytes from a window's start to the first line, in the high half to the next; [1]: of windows that begin at a line's second half

  __device__ __forceinline__ WindowLines() {
    const unsigned thread = thread_again(), row = thread / 32 % 4 * 32 + thread % 16, upper = thread / 128, second = W == 8 ? 0 : thread / 16 % 2 * 16;
    const unsigned line = Layout::whole(row, 0) ^ second;
    if constexpr (Layout::halves) {
      const unsigned half = Layout::half(row) ^ second;
      packed[0] = upper ? line + 128 + (half << 16) : line + ((line + 128) << 16);
      packed[1] = (upper ? line + ((line + 128) << 16) : half + (line << 16)) ^ (64 + (64u << 16));
    } else {
      packed[0] = (line + upper * 128) * 0x10001 + (128 << 16);
    }
  }

  // For a window in `stage` whose first block is block `before` of a line; column() as add_band wants it.
  __device__ __forceinline__ auto of(SharedAddress stage, unsigned before) const {
    const unsigned both = again(Layout::halves && before ? packed[Layout::halves] : packed[0]);
    const SharedAddress line = stage + (both & 0xffffu), next = stage + (both >> 16), middle = before ? next : line;
    return [line, next, middle, before](int j) -> SharedAddress {
      if (W == 64) return (j >= 8 ? next : line) ^ j % 8 * 16u;
      if (W == 32) return (j >= 8 ? next : j >= 4 ? middle : line) ^ j % 8 * 16u;
      const unsigned at = j + before + (W == 8 ? thread_again() / 16 % 2 : 0);
      return (at >= 8 ? next : line) ^ at % 8 * 16;
    };
  }
};

// grid: blocks of rows, fastest, and tiles of tokens, in z beyond a grid's most in y: blocks that run together then share tokens, whose rows
// stay in the L2 cache. Not one number that is divided: what comes of blockIdx as it is takes none of a thread's registers.
template <typename T, int W, bool Scatter>
__global__ void __launch_bounds__(stream_warps * 32, 2)
band_stream(const T* __restrict__ x, Packed packed, const T* __restrict__ bias, T* __restrict__ y, T* __restrict__ before, BandSizes s, bool with_gelu) {
  constexpr int M = 2;
  constexpr unsigned tile_quads = band_quads<W> * 32;  // of 16 bytes
  using Layout = StreamLayout<W>;
  DST_OPS_SHARED(memory);
  const unsigned token_tile = blockIdx.z * most_blocks_in_y + blockIdx.y;
  const int first_tile = blockIdx.x * stream_tiles;
  const auto tile = [first_tile] { return first_tile + static_cast<int>(thread_again() / 128); };
  const auto first_token = [token_tile] { return static_cast<int64_t>(token_tile) * stream_tokens; };
  const auto warp_token = [] { return static_cast<int>(thread_again() / 32 % 4 * 16 * M); };
  if (first_token() >= s.tokens) return;
  const int left = static_cast<int>(s.tokens - first_token() < stream_tokens ? s.tokens - first_token() : stream_tokens);  // tokens that are there
  const auto works = [&] { return tile() < s.tiles && warp_token() < left; };
  TileSums<M> sum;
  start_sums<T, M>(sum, bias, tile() * band_rows, s);
  await_previous();
  Bands<W, Scatter> bands(packed.starts, first_tile * 8, Layout::needed, s);

  // What each band needs and none changes. To compute it again for each took more instructions than to multiply.
  const WindowCopy<T, W> window(x + first_token() * s.in, s);
  const WindowLines<W> lines;
  const int whole_until = (first_tile + stream_tiles) * band_rows <= s.out ? s.present_blocks - Layout::needed : -1;  // first blocks of windows
  const auto words_of_tile = [&](int band, int tile) {  // their number fits an unsigned
    return reinterpret_cast<const uint4*>(packed.words) + static_cast<unsigned>(band * s.tiles + tile) * tile_quads;
  };

  const auto stage_next = [&](SharedAddress stage) {
    const bool more = bands.next(s);
    if (more) {
      if (Layout::with_weights) {
        constexpr unsigned threads = stream_warps * 32, all = stream_tiles * tile_quads;
        const unsigned thread = thread_again();
        const uint4* from = words_of_tile(bands.u, first_tile) + thread;
        const auto copy = [&](unsigned i) { copy_async<true>(stage + Layout::window + thread * 16 + i * 16, from + i, true); };
        if (first_tile + stream_tiles <= s.tiles) {
#pragma unroll
          for (unsigned i = 0; i < all; i += threads)
            if (i + threads <= all || i + thread < all) copy(i);
        } else {
#pragma unroll 1
          for (unsigned i = 0; i + thread < tile_quads; i += threads) copy(i);
        }
      }
      window.copy(stage, bands.first, left, s);
    }
    copies_commit();
    return more;
  };
  SharedAddress now = shared_address(memory), other = now + Layout::stage;
  bool more = stage_next(now);
  while (more) {
    const int u = bands.u, first = bands.first;
    more = stage_next(other);
    copies_wait<1>();
    __syncthreads();
    if (works()) {
      const unsigned thread = thread_again();
      const uint4* words = words_of_tile(u, tile()) + thread % 32;
      const auto weights = [words, own_words = now + Layout::window + (thread / 128 * tile_quads + thread % 32) * 16](int quad) {
        if constexpr (Layout::with_weights) return load_shared(own_words + quad * 32 * 16);
        else return words[quad * 32];
      };
      const auto column = lines.of(now, W == 64 ? 0 : static_cast<unsigned>(first) % 8);
      unsigned counting = ~0u;  // pairs
      if (first > whole_until) counting = pairs_that_count<W, Scatter>(wrapped(first + static_cast<int>(thread / 128) * 8, s.blocks), tile(), s);
      add_band<T, W, M, false>(sum, weights, Layout::rows16 / 16, column, [counting](int j) { return counting >> j / 2 & 1; });
    }
    __syncthreads();
    const SharedAddress filled = other;
    other = now, now = filled;
  }
  copies_wait<0>();
  if (works()) finish_tile<T, M>(y, before, sum, shared_address(memory) + thread_again() / 32 * store_bytes, first_token() + warp_token(), tile() * band_rows, with_gelu, s);
}

}  // namespace dst_ops
