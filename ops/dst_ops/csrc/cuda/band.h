// Bands of 8, 16, 32 or 64 adjacent diagonals that start at a multiple of their width, tensor cores, 16-bit numbers.
//
// Eight rows of the result meet W + 7 columns of a band, which lie in W / 8 + 1 blocks of 8 columns (W a multiple of 8, as
// is every first column). With the tokens on the 16-side of the matrix instruction, the weights on its 8-side, and a k8
// instruction for the odd block, W / (W + 8) of the multiplications are useful: 50, 67, 80, 89 %.
//
// A warp's tile is 64 rows, which meet 8 + W / 8 column blocks. It goes over pairs of them: loads the pair's columns once, and
// multiplies them for each 8 rows that meet both (k16) or one (k8). Weights are packed once a call, each lane's in the order
// in which it needs them; the corners of the parallelogram are zeros.
//
// Windows of columns lie in shared memory as lines: a row of a window is a few lines of 128 bytes that begin where lines of memory do, so
// that one is copied at once: a copy to 128 bytes that lie across two lines takes twice as long, or fetches half as much again. Eight rows'
// pieces of 16 bytes of one column block must lie in different banks, and so piece i of a line is where piece i ^ row % 8 would be: with the
// row's part in an address already, an exclusive-or with 16 i gives the piece.
#pragma once

#include "geometry.h"
#include "numbers.h"

namespace dst_ops {

constexpr int band_rows = 64;  // of the result: a warp's tile, 8 times 8

template <int W>
constexpr int band_blocks = W / 8 + 1;  // of 8 columns, met by 8 rows

// Whether rows 8 n, ... of a tile meet its column block `block`.
template <int W>
__host__ __device__ constexpr bool rows_meet(int n, int block) { return block - n >= 0 && block - n < band_blocks<W>; }

// Rows before 8 n of a tile, 8 at a time, that meet both blocks of a pair, and that meet one of them.
template <int W>
__host__ __device__ constexpr int rows_of_both(int pair, int n = 8) {
  int rows = 0;
  for (int m = 0; m < n; ++m) rows += rows_meet<W>(m, 2 * pair) && rows_meet<W>(m, 2 * pair + 1);
  return rows;
}
template <int W>
__host__ __device__ constexpr int rows_of_one(int pair, int n = 8) {
  int rows = 0;
  for (int m = 0; m < n; ++m) rows += rows_meet<W>(m, 2 * pair) != rows_meet<W>(m, 2 * pair + 1);
  return rows;
}
// Words that a lane needs for a pair, two or one for 8 rows. The twos come first: an instruction takes its two from registers
// that lie side by side, the first of an even number, and so they can stay where they were loaded.
template <int W>
__host__ __device__ constexpr int words_of(int pair) { return 2 * rows_of_both<W>(pair) + rows_of_one<W>(pair); }
// 16-byte pieces for a pair, and for the pairs before it.
template <int W>
__host__ __device__ constexpr int quads_of(int pair) { return (words_of<W>(pair) + 3) / 4; }
template <int W>
__host__ __device__ constexpr int quads_before(int pair) {
  int quads = 0;
  for (int p = 0; p < pair; ++p) quads += quads_of<W>(p);
  return quads;
}
template <int W>
constexpr int band_pairs = (8 + W / 8 + 1) / 2;
template <int W>
constexpr int band_quads = quads_before<W>(band_pairs<W>);  // of a lane, for a tile

// Sizes in the units of the band kernels. Computed on the host: as arguments of a kernel they take no registers.
struct BandSizes : Sizes {
  int blocks, present_blocks;  // of 8 columns: of the longer side, of the input
  int tiles, sub_bands;        // of 64 rows; of W diagonals, into which bands are cut
};
template <int W>
BandSizes band_sizes(const Sizes& s) { return {s, s.longer / 8, s.in / 8, (s.out + band_rows - 1) / band_rows, s.units * (s.band / W)}; }

// First column block that rows 8 n, ..., 8 n + 7 of the result meet in a band whose first diagonal is 8 start.
template <int W, bool Scatter>
__device__ __forceinline__ int first_block(int n, int start, int blocks) {
  return wrapped(Scatter ? n - start - W / 8 : n + start, blocks);
}

// Whether column blocks first, ..., first + count - 1 have numbers of the input.
template <int W, bool Scatter>
__device__ __forceinline__ bool band_meets(int first, int count, const BandSizes& s) { return !Scatter || meets(first, count, s.present_blocks, s.blocks); }

// The sub-bands that rows 8 n, ... of the result meet in `count` column blocks, in order. Each lane of a warp knows of one in 32.
template <int W, bool Scatter>
struct Bands {
  const int* starts;
  int n, count, begin = 0, mine = 0;  // the lane's: first column block
  unsigned left = 0;                  // those of the 32 from `begin` on that are met and still to come
  int u = 0, first = 0;               // the one that next() came to: its number, first column block

  __device__ __forceinline__ void look(const BandSizes& s) {
    const int lane = threadIdx.x & 31;
    const bool exists = begin + lane < s.sub_bands;
    mine = exists ? first_block<W, Scatter>(n, starts[begin + lane], s.blocks) : 0;
    left = __ballot_sync(~0u, exists && band_meets<W, Scatter>(mine, count, s));
  }
  __device__ __forceinline__ Bands(const int* starts, int n, int count, const BandSizes& s) : starts(starts), n(n), count(count) { look(s); }
  // False after the last.
  __device__ __forceinline__ bool next(const BandSizes& s) {
    while (left == 0) {
      begin += 32;
      if (begin >= s.sub_bands) return false;
      look(s);
    }
    const int lane = __ffs(left) - 1;
    left &= left - 1;
    u = begin + lane;
    first = __shfl_sync(~0u, mine, lane);
    return true;
  }
};

// Where sub-band u of W diagonals starts; bands of s.band (a multiple of W) diagonals are cut into those.
template <int W>
__device__ __forceinline__ int band_start(const int* offsets, int u, const Sizes& s) {
  const int parts = s.band / W;
  return first_diagonal(offsets, u / parts, s) + u % parts * W;
}

// What a call of a product makes of its weights.
// words [sub-band][tile of 64 rows][quad][lane][4]: a word has two columns of one row, half of fragment B; each pair of column blocks
// begins with a quad of its own. Words of tiles that a sub-band does not meet are not written.
// starts [sub-band]: its first diagonal / 8.
struct Packed {
  uint32_t* words;
  int* starts;
};

// Where a lane's word of rows 8 n, ... and a block is among a tile's.
template <int W>
__device__ __forceinline__ int word_at(int n, int block) {
  const int pair = block / 2, first = 2 * pair + 1 - W / 8 > 0 ? 2 * pair + 1 - W / 8 : 0, last = 2 * pair < 7 ? 2 * pair : 7;  // rows of both
  int words = 0;
#pragma unroll
  for (int p = 0; p < band_pairs<W>; ++p) words += p < pair ? 4 * quads_of<W>(p) : 0;
  if (n >= first && n <= last) return words + 2 * (n - first) + block % 2;
  return words + 2 * (last >= first ? last - first + 1 : 0) + (n > 2 * pair && 2 * pair >= W / 8);  // of one: rows before, rows behind those
}

// grid: tiles, sub-bands. A warp has 8 rows.
template <typename T, int W, bool Scatter>
__global__ void __launch_bounds__(256, 4) band_pack(const T* __restrict__ values, const int* __restrict__ offsets, Packed packed, BandSizes s) {
  let_next_begin();
  const int tile = blockIdx.x, lane = threadIdx.x % 32, n = threadIdx.x / 32, first_row = tile * band_rows + n * 8, row = first_row + lane / 4;
  for (int u = blockIdx.y; u < s.sub_bands; u += gridDim.y) {
    const int start = band_start<W>(offsets, u, s);
    if (tile == 0 && threadIdx.x == 0) packed.starts[u] = start / 8;
    if (!band_meets<W, Scatter>(first_block<W, Scatter>(tile * 8, start / 8, s.blocks), 8 + W / 8, s)) continue;
    uint32_t* words = packed.words + (static_cast<int64_t>(u) * s.tiles + tile) * (band_quads<W> * 32 * 4);
    const T* of_band = values + static_cast<int64_t>(u) * W * s.shorter;
#pragma unroll 3  // as many loads on their way as registers allow
    for (int j = 0; j < band_blocks<W>; ++j) {
      float pair_of[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        // Column counted from the first block; which of the band's diagonals crosses the row there, and where along itself.
        const int c = j * 8 + lane % 4 * 2 + e, diagonal = Scatter ? lane / 4 + W - c : c - lane / 4;
        const int at = Scatter ? wrapped(first_row - start - W + c, s.longer) : row;
        const bool present = diagonal >= 0 && diagonal < W && row < s.out && at < s.shorter;
        pair_of[e] = present ? wide(of_band[diagonal * s.shorter + at]) : 0.0f;
      }
      const int word = word_at<W>(n, n + j);
      words[(word / 4 * 32 + lane) * 4 + word % 4] = pair(pair_of[0], pair_of[1], T());
    }
  }
}

template <int M>
using TileSums = float[M][8][4];  // tiles of 16 tokens, of 8 rows; fragment D of the instruction

constexpr int store_bytes = 8 * 128;  // of shared memory that a warp needs to write its tile

// Writes a warp's tile: 16 * M tokens x 64 rows, by way of `own` in shared memory (store_bytes, of which no other thread knows), where
// eight tokens' lines come together, so that a token's 128 bytes are written at once. Piece i of line t lies where piece i ^ t would be.
template <bool Gelu, typename T, int M>
__device__ __forceinline__ void store_tile(T* to, const TileSums<M>& sum, SharedAddress own, int64_t first_token, int first_row, const Sizes& s) {
  const auto of = [](float v) { return Gelu ? gelu(v) : v; };
  const unsigned lane = thread_again() % 32;
  const SharedAddress put = own + lane / 4 * (128 + 16) + lane % 4 * 4, take = own + lane / 8 * 128 + (lane % 8 ^ lane / 8) * 16;
  const int row = first_row + static_cast<int>(lane % 8) * 8, left = row < s.out ? static_cast<int>(s.tokens - first_token < 16 * M ? s.tokens - first_token : 16 * M) : 0;
  T* at = to + (first_token + lane / 8) * s.out + row;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll(Gelu ? 1 : 2)  // GELU of all at once would not fit the registers
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < 8; ++n) store_shared(put ^ n * 16u, pair(of(half ? sum[m][n][2] : sum[m][n][0]), of(half ? sum[m][n][3] : sum[m][n][1]), T()));
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 q = load_shared((take ^ i * 64u) + i * 512);
        if (m * 16 + half * 8 + i * 4 + static_cast<int>(lane / 8) < left) store_global(at, q);
        at += 4 * s.out;
      }
      __syncwarp();
    }
}

// s.out is a multiple of 8: rows are there 8 at a time.
template <typename T, int M>
__device__ __forceinline__ void start_sums(TileSums<M>& sum, const T* bias, int first_row, const Sizes& s) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const bool present = bias && first_row + n * 8 < s.out;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float b = present ? wide(bias[first_row + n * 8 + column + e]) : 0.0f;
#pragma unroll
      for (int m = 0; m < M; ++m) sum[m][n][e] = sum[m][n][e + 2] = b;
    }
  }
}

// Which pairs of a tile's column blocks, counted from block `first`, are met by rows of the result and lie in the input: a bit each.
// The last pair of W = 8 has one block: where only the other one lies there, band_pack has left the tile's words unwritten.
template <int W, bool Scatter>
__device__ __forceinline__ unsigned pairs_that_count(int first, int tile, const BandSizes& s) {
  unsigned pairs = 0;
#pragma unroll
  for (int j = 0; j < 2 * band_pairs<W>; j += 2) {
    const int count = j + 1 < 8 + W / 8 ? 2 : 1;
    const bool counts = j - W / 8 < (s.out - tile * band_rows) / 8 && (!Scatter || meets(wrapped(first + j, s.blocks), count, s.present_blocks, s.blocks));
    pairs |= static_cast<unsigned>(counts) << j / 2;
  }
  return pairs;
}

// A lane's words of a pair. weights(quad): one of the tile's.
template <int W, int Pair>
using PairWords = uint32_t[4 * quads_of<W>(Pair)];
template <int W, int Pair, typename Weights>
__device__ __forceinline__ void load_words(PairWords<W, Pair>& b, const Weights& weights) {
#pragma unroll
  for (int q = 0; q < quads_of<W>(Pair); ++q) {
    const uint4 w = weights(quads_before<W>(Pair) + q);
    b[4 * q] = w.x, b[4 * q + 1] = w.y, b[4 * q + 2] = w.z, b[4 * q + 3] = w.w;
  }
}

// Adds the products with one pair of column blocks, whose columns are in a.
template <typename T, int W, int M, int Pair>
__device__ __forceinline__ void add_pair(TileSums<M>& sum, const uint32_t (&a)[M][4], const PairWords<W, Pair>& b) {
  int both = 0, one = 2 * rows_of_both<W>(Pair);
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const bool first = rows_meet<W>(n, 2 * Pair), second = rows_meet<W>(n, 2 * Pair + 1);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (first && second) mma_k16(T(), sum[m][n], a[m], b[both], b[both + 1]);
      else if (first) mma_k8(T(), sum[m][n], a[m][0], a[m][1], b[one]);
      else if (second) mma_k8(T(), sum[m][n], a[m][2], a[m][3], b[one]);
    }
    if (first && second) both += 2;
    else one += first || second;
  }
}

// Up to which first block all pairs of a tile's column blocks count, without going round: all lie in the input, and all rows in the result.
template <int W>
__device__ __forceinline__ int last_whole(int tile, const BandSizes& s) { return (tile + 1) * band_rows <= s.out ? s.present_blocks - 2 * band_pairs<W> : -1; }

// Adds a sub-band to a warp's tile, from one pair of column blocks on. column(j): where the 8 columns of the lane's token lie in block j,
// counted from the first that the tile meets, for lanes 0-15, and in block j + 1 for the others. pitch: bytes to the next token. counts(j):
// whether to multiply the pair that begins there. Ahead: a pair's words are asked for before the pair before is multiplied, since they
// come from the L2 cache. b: then this pair's.
template <typename T, int W, int M, bool Ahead, int Pair, typename Weights, typename Column, typename Counts>
__device__ __forceinline__ void add_pairs(TileSums<M>& sum, PairWords<W, Pair>& b, const Weights& weights, int pitch, const Column& column, const Counts& counts) {
  constexpr bool last = Pair + 1 == band_pairs<W>;
  constexpr int following = last ? Pair : Pair + 1;
  PairWords<W, following> next;
  if (Ahead && !last) load_words<W, following>(next, weights);
  if (counts(2 * Pair)) {
    if (!Ahead) load_words<W, Pair>(b, weights);
    const SharedAddress at = column(2 * Pair);
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_matrices(a[m], at + m * 16 * pitch);
    add_pair<T, W, M, Pair>(sum, a, b);
  }
  if constexpr (!last) add_pairs<T, W, M, Ahead, Pair + 1>(sum, next, weights, pitch, column, counts);
}
template <typename T, int W, int M, bool Ahead, typename Weights, typename Column, typename Counts>
__device__ __forceinline__ void add_band(TileSums<M>& sum, const Weights& weights, int pitch, const Column& column, const Counts& counts) {
  PairWords<W, 0> b;
  if (Ahead) load_words<W, 0>(b, weights);
  add_pairs<T, W, M, Ahead, 0>(sum, b, weights, pitch, column, counts);
}

// Applies the epilogue and writes; own: see store_tile.
template <typename T, int M>
__device__ __forceinline__ void finish_tile(T* y, T* before, const TileSums<M>& sum, SharedAddress own, int64_t first_token, int first_row, bool with_gelu, const Sizes& s) {
  T* const plain = with_gelu ? before : y;
  if (plain) store_tile<false, T, M>(plain, sum, own, first_token, first_row, s);
  if (with_gelu) store_tile<true, T, M>(y, sum, own, first_token, first_row, s);
}

}  // namespace dst_ops
