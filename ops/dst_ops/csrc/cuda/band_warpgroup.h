// Products of bands by the instructions of a warpgroup, four warps that multiply by matrices where these lie in shared memory (H100); see band.h.
//
// A block has two warpgroups, of which each computes 64 rows of the result for all tokens of a tile, and a warp that asks the copy engine
// for what they need, as far ahead as there is room. The weights of a warpgroup's rows are in its registers, on the side of 64, and each
// instruction multiplies 16 columns of x by those: W / (W + 64) of the multiplications are useful, but x is read half as often from shared
// memory as a warp can that multiplies on its own. Two ways to have the columns of x at hand:
//
// stream: boxes of W columns x all tokens of a tile, each with its weights. For any number of features.
// resident: 128 tokens with all their features, as long as tiles of rows are computed of them; only weights are fetched for each band.
#pragma once

#include "band.h"

namespace dst_ops {

// A tile of 128 rows in two halves, which multiply by 16 columns at a time: a step. Its weights are fragments, of a warp's 16 rows, for the
// warps that it meets. Bands of 8 are taken as 16 diagonals, of which 8 are zeros.
template <int W>
struct HalfSteps {
  static constexpr int rows = 128, half_rows = 64;
  static constexpr int span = W < 16 ? 16 : W, window = (rows + span) / 8;  // column blocks of 8 that a tile meets
  static constexpr int steps = (half_rows + span) / 16, of_warp = span / 16 + 1, fragment = 512;  // of a half; of which a warp's rows meet, from as many on as there are warps before; bytes
  static constexpr int half_bytes = 4 * of_warp * fragment, tile_bytes = 2 * half_bytes;
  static __host__ __device__ constexpr int above(int a, int b) { return a > b ? a - b : 0; }
  static __host__ __device__ constexpr int first_warp(int step) { return above(step, of_warp - 1); }
  // Fragments of all steps before one.
  static __host__ __device__ constexpr int before(int step) {
    const int beyond = above(step, 4), late = above(step, of_warp - 1);
    return step * (step + 1) / 2 - beyond * (beyond + 1) / 2 - late * (late - 1) / 2;
  }
};
static_assert(HalfSteps<16>::before(5) == 8 && HalfSteps<32>::before(6) == 12 && HalfSteps<64>::before(8) == 20, "all fragments of a half");

template <int W, bool Scatter>
__device__ __forceinline__ int first_of_window(int tile, int start, int blocks) {
  const int first = first_block<W, Scatter>(tile * 16, start, blocks);
  return W < 16 ? first & ~1 : first;
}

// The sub-bands that a tile of 128 rows meets, in order, as Bands.
template <int W, bool Scatter>
struct TileBands {
  const int* starts;
  int tile, begin = 0, mine = 0;
  unsigned left = 0;
  int u = 0, first = 0;

  __device__ __forceinline__ void look(const BandSizes& s) {
    const int lane = threadIdx.x & 31;
    const bool exists = begin + lane < s.sub_bands;
    mine = exists ? first_of_window<W, Scatter>(tile, starts[begin + lane], s.blocks) : 0;
    left = __ballot_sync(~0u, exists && band_meets<W, Scatter>(mine, HalfSteps<W>::window, s));
  }
  __device__ __forceinline__ TileBands(const int* starts, int tile, const BandSizes& s) : starts(starts), tile(tile) { look(s); }
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

constexpr int pack_threads = 256;

// words [sub-band][tile of 128 rows][half][step][warp]: fragments A of m16n8k16, a lane's four words together.
template <typename T, int W, bool Scatter>
__global__ void __launch_bounds__(pack_threads, 4) band_pack_steps(const T* __restrict__ values, const int* __restrict__ offsets, Packed packed, BandSizes s, int row_tiles) {
  using Steps = HalfSteps<W>;
  let_next_begin();
  constexpr int pitch = Steps::rows + 2;
  DST_OPS_SHARED(memory);
  T* const along = reinterpret_cast<T*>(memory);  // [diagonal][row]
  const int tile = blockIdx.x, first_row = tile * Steps::rows, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int u = blockIdx.y; u < s.sub_bands; u += gridDim.y) {
    const int start = band_start<W>(offsets, u, s);
    if (tile == 0 && threadIdx.x == 0) packed.starts[u] = start / 8;
    const int first = first_of_window<W, Scatter>(tile, start / 8, s.blocks);
    if (!band_meets<W, Scatter>(first, Steps::window, s)) continue;
    const T* of_band = values + static_cast<int64_t>(u) * W * s.shorter;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < W * Steps::rows / pack_threads; ++i) {
      const int diagonal = (i * pack_threads + static_cast<int>(threadIdx.x)) / Steps::rows, local = threadIdx.x % Steps::rows, row = first_row + local;
      int at = row;
      if (Scatter) {
        at = row - start - diagonal;
        if (at < 0) at += s.longer;
      }
      T v;
      narrow(0.0f, v);
      if (row < s.out && at < s.shorter) v = of_band[static_cast<int64_t>(diagonal) * s.shorter + at];
      along[diagonal * pitch + local] = v;
    }
    __syncthreads();
    uint32_t* words = packed.words + (static_cast<int64_t>(u) * row_tiles + tile) * (Steps::tile_bytes / 4);
    // Columns that the window has before the tile's first.
    const int skipped = W < 16 ? (first_block<W, Scatter>(tile * 16, start / 8, s.blocks) & 1) * 8 : 0;
    constexpr int fragments = 8 * Steps::of_warp;
#pragma unroll
    for (int f = warp; f < fragments; f += pack_threads / 32) {
      const int rows16 = f / Steps::of_warp, i = f % Steps::of_warp, step = rows16 % 4 + i;
      uint32_t word[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float pair_of[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = lane / 4 + r % 2 * 8, c = i * 16 + r / 2 * 8 + lane % 4 * 2 + e - skipped - row, diagonal = Scatter ? W - c : c;
          pair_of[e] = diagonal >= 0 && diagonal < W ? wide(along[diagonal * pitch + rows16 * 16 + row]) : 0.0f;
        }
        word[r] = pair(pair_of[0], pair_of[1], T());
      }
      const int place = Steps::before(step) + rows16 % 4 - Steps::first_warp(step);
      reinterpret_cast<uint4*>(words)[(rows16 / 4 * Steps::half_bytes + place * Steps::fragment) / 16 + lane] = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
}

constexpr int group_store_bytes = 32 * 128;  // of shared memory that a warpgroup needs to write its rows

// Shared memory: x where it is resident, slots of the ring, barriers, and room for each warpgroup to write its tile. A slot: a box of columns
// and the weights of its steps, or the weights of a half. Sizes in bytes.
template <int W, int Tokens, bool Resident>
struct GroupLayout {
  using Steps = HalfSteps<W>;
  static constexpr int groups = 2, warps = groups * 4, threads = (groups + 1) * 128;
  // Of the last four warps one asks for weights and one for x, as asking takes time; the others only give their registers.
  static constexpr int askers = Resident ? 1 : 2;
  static constexpr int slots_of_band = Resident ? 2 : (Steps::rows + W) / W;
  static constexpr int columns = Resident ? 64 : W, box = Tokens * columns * 2;  // of a box
  // Steps of a half that a slot has.
  static __host__ __device__ constexpr int clamped(int step) { return step < 0 ? 0 : step < Steps::steps ? step : Steps::steps; }
  static __host__ __device__ constexpr int begin(int slot, int half) { return Resident ? 0 : clamped(slot * (W / 16) - 4 * half); }
  static __host__ __device__ constexpr int end(int slot, int half) { return Resident ? (slot == half) * Steps::steps : clamped((slot + 1) * (W / 16) - 4 * half); }
  static __host__ __device__ constexpr int weights(int slot, int half) { return (Steps::before(end(slot, half)) - Steps::before(begin(slot, half))) * Steps::fragment; }
  static constexpr int most_weights() {
    int most = 0;
    for (int i = 0; i < slots_of_band; ++i) most = weights(i, 0) + weights(i, 1) > most ? weights(i, 0) + weights(i, 1) : most;
    return most;
  }
  static constexpr int weights_at = Resident ? 0 : box, slot = weights_at + most_weights();
  static constexpr int all = 227 * 1024, around = 1024 + 512 + groups * group_store_bytes;  // what the slots and x leave
  static constexpr int resident_boxes = 12;
  static constexpr int slots = (all - around - (Resident ? resident_boxes * box : 0)) / slot;
  static_assert(slots >= 2 && (2 * slots + 2) * 8 <= 512 - 128 && slot % (Resident ? 128 : 1024) == 0);
  static __host__ __device__ constexpr int bytes(int boxes) { return boxes * box + slots * slot + around; }  // boxes: of x, resident
};

template <int Count, int I = 0, typename F>
__device__ __forceinline__ void for_each(const F& f) {
  if constexpr (I < Count) {
    f(std::integral_constant<int, I>());
    for_each<Count, I + 1>(f);
  }
}

#if DST_OPS_BOXES
// Writes a warpgroup's 64 rows of all tokens by way of `own` in shared memory, where 32 tokens' lines come together, so that a token's 128 bytes
// are written at once. Piece i of line t lies where piece i ^ t would be.
template <bool Gelu, typename T, int Tokens>
__device__ __forceinline__ void store_group(T* to, const float (&sum)[Tokens / 8][4], SharedAddress own, int group, int64_t first_token, int first_row, const Sizes& s) {
  const auto of = [](float v) { return Gelu ? gelu(v) : v; };
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const SharedAddress put = own + (lane / 16 * 8 + lane % 8) * 128 + ((warp * 2 + lane / 8 % 2) ^ lane % 8) * 16;
  const SharedAddress take = own + (warp * 8 + lane / 8) * 128 + (lane % 8 ^ lane / 8) * 16;
  const int row = first_row + lane % 8 * 8;
  const int64_t left = row < s.out ? s.tokens - first_token : 0;
  T* at = to + (first_token + warp * 8 + lane / 8) * s.out + row;
#pragma unroll
  for (int t = 0; t < Tokens; t += 32) {
    if (first_token + t >= s.tokens) break;
    if (t > 0) group_sync(group);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto& a = sum[t / 8 + 2 * i];
      const auto& b = sum[t / 8 + 2 * i + 1];
      store_matrices_transposed(put + i * 16 * 128, pair(of(a[0]), of(a[1]), T()), pair(of(a[2]), of(a[3]), T()), pair(of(b[0]), of(b[1]), T()), pair(of(b[2]), of(b[3]), T()));
    }
    group_sync(group);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 q = load_shared((take ^ i * 64u) + i * 4 * 128);
      if (t + i * 4 + warp * 8 + lane / 8 < left) store_global(at + static_cast<int64_t>(t + i * 4) * s.out, q);
    }
  }
  group_sync(group);
}
#endif

// grid: as many blocks as there are processors, or tiles. A tile is tile % row_tiles of the rows, tile / row_tiles of the tokens.
template <typename T, int W, int Tokens, bool Resident, bool Scatter>
__global__ void __launch_bounds__(DST_OPS_BOXES ? GroupLayout<W, Tokens, Resident>::threads : 32, 1)
band_groups(const __grid_constant__ TensorMap x, Packed packed, const T* __restrict__ bias, T* __restrict__ y, T* __restrict__ before, BandSizes s, bool with_gelu, int row_tiles,
            int64_t tiles, int boxes) {
#if DST_OPS_BOXES
  using Layout = GroupLayout<W, Tokens, Resident>;
  using Steps = HalfSteps<W>;
  DST_OPS_SHARED(raw);
  const SharedAddress memory = (shared_address(raw) + 1023) / 1024 * 1024;
  const SharedAddress ring = memory + (Resident ? boxes * Layout::box : 0), barriers = ring + Layout::slots * Layout::slot;
  const auto full = [=](int slot) { return barriers + slot * 8; };   // what was asked for has come
  const auto empty = [=](int slot) { return barriers + (Layout::slots + slot) * 8; };  // all warps have read it
  const SharedAddress x_full = barriers + 2 * Layout::slots * 8, x_empty = x_full + 8, zeros = barriers + 512 - 128;  // zeros: for columns that are not there
  if (Resident && threadIdx.x < 32) store_shared(zeros + threadIdx.x * 4, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Layout::slots; ++i) barrier_init(full(i), Layout::askers), barrier_init(empty(i), Layout::warps);
    barrier_init(x_full, 1), barrier_init(x_empty, Layout::warps);
    barriers_ready();
  }
  fence_for_groups();
  __syncthreads();
  await_previous();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Tiles of a block: those that run at the same time share tokens. Resident, one after the other, of which neighbours begin or end with the
  // same tokens.
  const int64_t first_of_block = tiles * blockIdx.x / gridDim.x, end_of_block = tiles * (blockIdx.x + 1) / gridDim.x;
  const int64_t count = Resident ? end_of_block - first_of_block : (tiles - blockIdx.x + gridDim.x - 1) / gridDim.x;
  const auto tile_of_block = [=](int64_t i) {
    if (!Resident) return blockIdx.x + i * gridDim.x;
    return blockIdx.x % 2 ? end_of_block - 1 - i : first_of_block + i;
  };
  int slot = 0;
  unsigned turn = 0;  // of the ring, mod 2
  const auto go_on = [&] {
    if (++slot == Layout::slots) slot = 0, turn ^= 1;
  };
  // Of a window's columns, so many from its first on.
  const auto column_of = [&](int first, int columns) {
    int column = first * 8 + columns;
    while (column >= s.longer) column -= s.longer;
    return column;
  };
  int64_t tokens_there = -1;
  unsigned x_turn = 0;

  if (warp >= Layout::warps) {
    give_registers<56>();
    if (warp > Layout::warps + 1) return;
    const bool of_x = warp > Layout::warps;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t tile = tile_of_block(i), token_tile = tile / row_tiles;
      const int row_tile = static_cast<int>(tile % row_tiles), first_token = static_cast<int>(token_tile) * Tokens;
      if (Resident && of_x) {
        if (token_tile == tokens_there) continue;
        barrier_wait(x_empty, x_turn ^ 1);
        x_turn ^= 1, tokens_there = token_tile;
        if (lane == 0) {
          barrier_expect(x_full, boxes * Layout::box);
          for (int b = 0; b < boxes; ++b) copy_box(memory + b * Layout::box, x, b * Layout::columns, first_token, x_full);
        }
        __syncwarp();
        continue;
      }
      TileBands<W, Scatter> bands(packed.starts, row_tile, s);
      while (bands.next(s)) {
        const unsigned char* words = reinterpret_cast<const unsigned char*>(packed.words) + (static_cast<int64_t>(bands.u) * row_tiles + row_tile) * Steps::tile_bytes;
        for_each<Layout::slots_of_band>([&](auto index) {
          constexpr int i = decltype(index)::value;
          barrier_wait(empty(slot), turn ^ 1);
          if (lane == 0) {
            const SharedAddress to = ring + slot * Layout::slot;
            if (of_x) {
              barrier_expect(full(slot), Layout::weights_at);
              copy_box(to, x, column_of(bands.first, i * W), first_token, full(slot));  // zeros where the tensor has nothing
            } else {
              barrier_expect(full(slot), Layout::weights(i, 0) + Layout::weights(i, 1));
              for_each<2>([&](auto of_slot) {
                constexpr int half = decltype(of_slot)::value;
                if constexpr (Layout::weights(i, half) > 0)
                  copy_bulk(to + Layout::weights_at + half * Layout::weights(i, 0), words + half * Steps::half_bytes + Steps::before(Layout::begin(i, half)) * Steps::fragment, Layout::weights(i, half),
                            full(slot));
              });
            }
          }
          __syncwarp();
          go_on();
        });
      }
    }
    return;
  }

  take_registers<224>();
  const int group = warp / 4;
  const auto compute = [&](auto of_group) {
    constexpr int half = decltype(of_group)::value;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t tile = tile_of_block(i), token_tile = tile / row_tiles;
      const int row_tile = static_cast<int>(tile % row_tiles), first_row = row_tile * Steps::rows + half * Steps::half_rows;
      if (Resident && token_tile != tokens_there) {
        barrier_wait(x_full, x_turn);
        x_turn ^= 1, tokens_there = token_tile;
      }
      float sum[Tokens / 8][4];
      {
        const int row = first_row + warp % 4 * 16 + lane / 4;
        const float upper = bias && row < s.out ? wide(bias[row]) : 0.0f, lower = bias && row + 8 < s.out ? wide(bias[row + 8]) : 0.0f;
#pragma unroll
        for (int t = 0; t < Tokens / 8; ++t) sum[t][0] = sum[t][1] = upper, sum[t][2] = sum[t][3] = lower;
      }
      TileBands<W, Scatter> bands(packed.starts, row_tile, s);
      while (bands.next(s)) {
        SharedAddress reading = 0;  // the barrier of a slot that may still be read
        for_each<Layout::slots_of_band>([&](auto index) {
          constexpr int i = decltype(index)::value, begin = Layout::begin(i, half), steps = Layout::end(i, half) - begin;
          barrier_wait(full(slot), turn);
          if constexpr (steps > 0) {
            const SharedAddress here = ring + slot * Layout::slot;
            uint4 weights[steps];
#pragma unroll
            for (int j = 0; j < steps; ++j) {
              const int place = Steps::before(begin + j) - Steps::before(begin) + warp % 4 - Steps::first_warp(begin + j);
              const bool meets = warp % 4 >= Steps::first_warp(begin + j) && warp % 4 <= begin + j;
              weights[j] = meets ? load_shared(here + Layout::weights_at + half * Layout::weights(i, 0) + place * Steps::fragment + lane * 16) : make_uint4(0, 0, 0, 0);
            }
            Matrix columns[steps];
#pragma unroll
            for (int j = 0; j < steps; ++j) {
              const int column = half * Steps::half_rows + (begin + j) * 16;
              if constexpr (Resident) {
                const int at = column_of(bands.first, column);
                const Matrix there = matrix_of_lines<128>(memory + at / 64 * Layout::box + at % 64 * 2);
                columns[j] = Scatter && at >= s.in ? matrix_of_same(zeros) : there;
              } else {
                columns[j] = matrix_of_lines<W * 2>(here + column % W * 2);
              }
            }
            group_begin();
#pragma unroll
            for (int j = 0; j < steps; ++j) multiply_group(T(), sum, weights[j], columns[j]);
            group_commit();
            constexpr bool last = i + 1 == Layout::slots_of_band || Layout::end(i + 1, half) == Layout::begin(i + 1, half);
            group_wait<!last>();
            if (lane == 0) {
              if (reading) barrier_arrive(reading);
              if (last) barrier_arrive(empty(slot));
            }
            reading = empty(slot);
          } else if (lane == 0) {
            barrier_arrive(empty(slot));
          }
          go_on();
        });
      }
      if (Resident && (i + 1 == count || tile_of_block(i + 1) / row_tiles != token_tile) && lane == 0) barrier_arrive(x_empty);
      const SharedAddress own = barriers + 512 + half * group_store_bytes;
      T* const plain = with_gelu ? before : y;
      if (plain) store_group<false, T, Tokens>(plain, sum, own, half, token_tile * Tokens, first_row, s);
      if (with_gelu) store_group<true, T, Tokens>(y, sum, own, half, token_tile * Tokens, first_row, s);
    }
  };
  if (group == 0) compute(std::integral_constant<int, 0>());
  else compute(std::integral_constant<int, 1>());
#endif
}

}  // namespace dst_ops
