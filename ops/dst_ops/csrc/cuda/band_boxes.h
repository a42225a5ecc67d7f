// Products of bands of 32 and 64 where the chip has an engine that copies boxes of a tensor (H100); see band.h.
//
// A block computes tiles of 128 tokens x 128 rows, one after the other. Of each band that a tile meets, one warp asks the engine for the
// window of columns, a box of W columns x 128 tokens after the other, and for the packed weights, as many bands ahead as there is room;
// eight warps multiply. What is fetched for the next tile comes while this one is written, and no warp spends instructions on addresses.
#pragma once

#include "band.h"

namespace dst_ops {

// A stage in shared memory: boxes, in which eight rows' pieces of 16 bytes lie in different banks, as the engine's swizzle has it, and the
// weights of two tiles of 64 rows. Sizes in bytes.
template <int W>
struct BoxLayout {
  static constexpr int warps = 8, threads = (warps + 1) * 32, tokens = 128, tiles = 2;  // of a block: those that multiply, 4 along the tokens and one for each tile of rows
  static constexpr int boxes = tiles * band_rows / W + 1, box = tokens * W * 2, window = boxes * box;
  static constexpr int tile_words = band_quads<W> * 32 * 16, stage = window + tiles * tile_words;
  static constexpr int stages = W == 64 ? 3 : 4;
  static constexpr int swizzled = 1024;  // where a pattern of the swizzle begins
  static constexpr int barriers = stages * stage, stores = barriers + 128, bytes = swizzled + stores + warps * store_bytes;
  static_assert(stage % swizzled == 0 && 2 * stages * 8 <= 128);
};
static_assert(BoxLayout<32>::bytes <= 227 * 1024 && BoxLayout<64>::bytes <= 227 * 1024, "all that a block of an H100 may ask for");

// grid: as many blocks as there are processors, or tiles. row_tiles: of 128 rows; tiles that run together share tokens.
template <typename T, int W, bool Scatter>
__global__ void __launch_bounds__(DST_OPS_BOXES ? BoxLayout<W>::threads : 32, 1)
band_boxes(const __grid_constant__ TensorMap x, Packed packed, const T* __restrict__ bias, T* __restrict__ y, T* __restrict__ before, BandSizes s, bool with_gelu, int row_tiles,
           int64_t tiles) {
#if DST_OPS_BOXES
  using Layout = BoxLayout<W>;
  constexpr int M = 2, needed = Layout::tiles * 8 + W / 8;
  DST_OPS_SHARED(raw);
  const SharedAddress memory = (shared_address(raw) + Layout::swizzled - 1) / Layout::swizzled * Layout::swizzled;
  const auto full = [memory](int stage) { return memory + Layout::barriers + stage * 8; };   // what was asked for has come
  const auto empty = [memory](int stage) { return memory + Layout::barriers + (Layout::stages + stage) * 8; };  // all warps have read it
  if (threadIdx.x == 0) {
    for (int i = 0; i < Layout::stages; ++i) barrier_init(full(i), 1), barrier_init(empty(i), Layout::warps);
    barriers_ready();
  }
  __syncthreads();
  await_previous();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int stage = 0;
  unsigned turn = 0;  // of the stages, mod 2
  const auto go_on = [&] {
    if (++stage == Layout::stages) stage = 0, turn ^= 1;
  };
  if (warp == Layout::warps) {
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int first_tile = static_cast<int>(tile % row_tiles) * Layout::tiles, first_token = static_cast<int>(tile / row_tiles) * Layout::tokens;
      Bands<W, Scatter> bands(packed.starts, first_tile * 8, needed, s);
      while (bands.next(s)) {
        barrier_wait(empty(stage), turn ^ 1);
        if (lane == 0) {
          const SharedAddress to = memory + stage * Layout::stage;
          const int words = (s.tiles - first_tile < Layout::tiles ? s.tiles - first_tile : Layout::tiles) * Layout::tile_words;
          barrier_expect(full(stage), Layout::window + words);
          int column = bands.first * 8;
#pragma unroll
          for (int i = 0; i < Layout::boxes; ++i) {
            copy_box(to + i * Layout::box, x, column, first_token, full(stage));  // zeros where the tensor has nothing
            column += W;
            if (column >= s.longer) column = 0;
          }
          copy_bulk(to + Layout::window, packed.words + (static_cast<int64_t>(bands.u) * s.tiles + first_tile) * (Layout::tile_words / 4), words, full(stage));
        }
        __syncwarp();
        go_on();
      }
    }
    return;
  }

  const int part = warp / 4, warp_token = warp % 4 * 16 * M;  // of the tile: 64 rows, 32 tokens
  // From a stage: to the lane's token's first two blocks of columns, of which lanes 0-15 read one, the others the next; to its words.
  const unsigned row = warp_token + lane % 16, swizzle = W == 64 ? row % 8 : row / 2 % 4;
  const unsigned columns = part * (band_rows / W) * Layout::box + row * (W * 2) + (lane / 16 ^ swizzle) * 16;
  const unsigned words = Layout::window + part * Layout::tile_words + lane * 16;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int first_tile = static_cast<int>(tile % row_tiles) * Layout::tiles, own_tile = first_tile + part;
    const int64_t first_token = tile / row_tiles * Layout::tokens + warp_token;
    const bool works = own_tile < s.tiles && first_token < s.tokens;
    TileSums<M> sum;
    start_sums<T, M>(sum, bias, own_tile * band_rows, s);
    Bands<W, Scatter> bands(packed.starts, first_tile * 8, needed, s);
    while (bands.next(s)) {
      barrier_wait(full(stage), turn);
      // Of a tile that a band does not meet no words are written.
      if (works && band_meets<W, Scatter>(wrapped(bands.first + part * 8, s.blocks), 8 + W / 8, s)) {
        const SharedAddress here = memory + stage * Layout::stage;
        add_band<T, W, M, false>(
            sum, [here = here + words](int quad) { return load_shared(here + quad * 32 * 16); }, W * 2,
            [here = here + columns](int j) { return (here ^ j % (W / 8) * 16u) + j / (W / 8) * Layout::box; }, [](int) { return true; });
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(empty(stage));
      go_on();
    }
    if (works) finish_tile<T, M>(y, before, sum, memory + Layout::stores + warp * store_bytes, first_token, own_tile * band_rows, with_gelu, s);
  }
#endif
}

}  // namespace dst_ops
