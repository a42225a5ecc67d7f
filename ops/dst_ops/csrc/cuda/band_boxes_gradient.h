// Gradient of the values of bands of 32 and 64 where the chip has an engine that copies boxes (H100): as band_gradient.h, with twice as many
// bands in a block, whose windows share the shorter side's columns. Their sums take more registers than all threads of a block can have:
// the four warps that ask for copies give theirs away. One alone would ask too slowly for boxes of so few tokens.
#pragma once

#include "band.h"

namespace dst_ops {

// A stage in shared memory: boxes of the shorter side, 64 columns wide, then those of each band's window, W columns wide; then, for each warp,
// room to turn the sums of 16 positions. Sizes in bytes.
template <int W>
struct BoxGradientLayout {
  static constexpr int warps = 8, askers = 4, threads = (warps + askers) * 32, tokens = 32, columns = warps * 32, bands = W == 64 ? 2 : 4;  // columns: positions l of a block, 32 a warp
  static constexpr int box_columns = 64, box = tokens * 128, shorts = columns / box_columns * box;
  static constexpr int long_box = tokens * W * 2, long_boxes = columns / W + 1, window = long_boxes * long_box;
  static constexpr int asked = (bands * long_boxes + askers - 1) / askers;  // of the bands' boxes, by a warp
  static constexpr int stage = shorts + bands * window, stages = W == 64 ? 3 : 2, swizzled = 1024;
  static constexpr int barriers = stages * stage, starts = barriers + 64, turned = barriers + 128, turned_warp = W * 17 * 4;
  static constexpr int bytes = swizzled + turned + warps * turned_warp;
  static_assert(columns / box_columns == askers && stage % swizzled == 0 && shorts % swizzled == 0 && window % swizzled == 0);
};
static_assert(BoxGradientLayout<32>::bytes <= 227 * 1024 && BoxGradientLayout<64>::bytes <= 227 * 1024, "all that a block of an H100 may ask for");

// parts[split][k][l], as in scalar_gradient. grid: blocks of l, of bands, splits of the tokens. each, more: a block has so many
// bands, the first `more` of them one more. Feature counts: multiples of 8.
template <typename T, int W>
__global__ void __launch_bounds__(DST_OPS_BOXES ? BoxGradientLayout<W>::threads : 32, 1)
band_boxes_gradient(const __grid_constant__ TensorMap shorter, const __grid_constant__ TensorMap longer, const int* __restrict__ offsets, float* __restrict__ parts, Sizes s, int each, int more) {
#if DST_OPS_BOXES
  using Layout = BoxGradientLayout<W>;
  constexpr int B = Layout::bands, J = W / 8 + 2;
  DST_OPS_SHARED(raw);
  const SharedAddress memory = (shared_address(raw) + Layout::swizzled - 1) / Layout::swizzled * Layout::swizzled;
  int* const starts = reinterpret_cast<int*>(raw + (memory - shared_address(raw)) + Layout::starts);  // of each band the first diagonal, -1 if there is none
  const auto full = [memory](int stage) { return memory + Layout::barriers + stage * 8; };
  const auto empty = [memory](int stage) { return memory + Layout::barriers + (Layout::stages + stage) * 8; };
  const int l0 = blockIdx.x * Layout::columns;
  const auto first_band = [=](int block) { return block * each + min(block, more); };
  if (threadIdx.x < B) {
    const int u = first_band(static_cast<int>(blockIdx.y)) + static_cast<int>(threadIdx.x);
    starts[threadIdx.x] = u < first_band(static_cast<int>(blockIdx.y) + 1) ? band_start<W>(offsets, u, s) : -1;
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < Layout::stages; ++i) barrier_init(full(i), Layout::askers), barrier_init(empty(i), Layout::warps);
    barriers_ready();
  }
  __syncthreads();

  // Splits end where stages do: a box takes all of its tokens, and zeros only beyond the last.
  const int64_t pieces = (s.tokens + Layout::tokens - 1) / Layout::tokens;
  const int begin = static_cast<int>(pieces * blockIdx.z / gridDim.z), end = static_cast<int>(pieces * (blockIdx.z + 1) / gridDim.z);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int stage = 0;
  unsigned turn = 0;  // of the stages, mod 2
  const auto go_on = [&] {
    if (++stage == Layout::stages) stage = 0, turn ^= 1;
  };
  if (warp >= Layout::warps) {
    give_registers<40>();
    if (lane > 0) return;
    // Each asks for a box of the shorter side and every fourth of the bands', whose columns are the same at every stage.
    const int asker = warp - Layout::warps;
    int columns[Layout::asked], there = 0;  // -1: no box
#pragma unroll
    for (int i = 0; i < Layout::asked; ++i) {
      const int box = i * Layout::askers + asker, start = box < B * Layout::long_boxes ? starts[box / Layout::long_boxes] : -1;
      columns[i] = start < 0 ? -1 : (l0 + start + box % Layout::long_boxes * W) % s.longer;
      there += start >= 0;
    }
    for (int piece = begin; piece < end; ++piece) {
      barrier_wait(empty(stage), turn ^ 1);
      const SharedAddress to = memory + stage * Layout::stage;
      barrier_expect(full(stage), Layout::box + there * Layout::long_box);
      copy_box(to + asker * Layout::box, shorter, l0 + asker * Layout::box_columns, piece * Layout::tokens, full(stage));
#pragma unroll
      for (int i = 0; i < Layout::asked; ++i)
        if (columns[i] >= 0) copy_box(to + Layout::shorts + (i * Layout::askers + asker) * Layout::long_box, longer, columns[i], piece * Layout::tokens, full(stage));
      go_on();
    }
    return;
  }

  take_registers<232>();
  float sum[B][2][J][4] = {};
  // From a stage: fragment A, matrices (tokens 0-7, l 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15), each read transposed; fragment B of two
  // blocks of columns: (tokens 0-7, block j), (8-15, j), (0-7, j + 1), (8-15, j + 1), of which the warp's first lies at `first`, its fifth at `fifth`.
  const unsigned shorts = warp / 2 * Layout::box + (lane / 16 * 8 + lane % 8) * 128 + ((warp % 2 * 4 + lane / 8 % 2) ^ lane % 8) * 16;
  const unsigned token = lane % 16, half = W == 64 ? warp % 2 * 4 : 0;
  const unsigned first = Layout::shorts + (W == 64 ? warp / 2 : warp) * Layout::long_box + token * (W * 2) + ((half + lane / 16) ^ (W == 64 ? token % 8 : token / 2 % 4)) * 16;
  const unsigned fifth = W == 64 ? (first ^ 64) + (half ? Layout::long_box : 0) : first + Layout::long_box;
  for (int piece = begin; piece < end; ++piece) {
    barrier_wait(full(stage), turn);
    const SharedAddress here = memory + stage * Layout::stage;
#pragma unroll
    for (int k = 0; k < Layout::tokens; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_matrices_transposed(a[m], here + (shorts ^ m * 32u) + k * 128);
#pragma unroll
      for (int b = 0; b < B; ++b) {
        if (b > 0 && starts[b] < 0) break;
#pragma unroll
        for (int j = 0; j < J + 2; j += 2) {
          uint32_t q[4];
          const unsigned line = j < 4 ? first : j < 8 ? fifth : first + Layout::long_box;
          load_matrices_transposed(q, here + (line ^ j % 4 * 16u) + b * Layout::window + k * W * 2);
#pragma unroll
          for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int block = j + i - 2 * m;  // counted from the 16 positions' own first column
              if (block >= 0 && block < J) mma_k16(T(), sum[b][m][block], a[m], q[2 * i], q[2 * i + 1]);
            }
        }
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(empty(stage));
    go_on();
  }

  // Sums lie along diagonals: through shared memory, so that what is written is adjacent.
  const int own_warp = static_cast<int>(thread_again() / 32), own_lane = static_cast<int>(thread_again() % 32);  // registers would not hold them over the loop
  const int64_t written_bands = static_cast<int64_t>(blockIdx.z) * (s.units * (s.band / W)) + first_band(static_cast<int>(again(blockIdx.y)));
  float* const own = reinterpret_cast<float*>(raw + (memory - shared_address(raw)) + Layout::turned + own_warp * Layout::turned_warp);
#pragma unroll
  for (int b = 0; b < B; ++b)
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (starts[b] < 0) continue;
#pragma unroll
      for (int j = 0; j < J; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int l = own_lane / 4 + e / 2 * 8, diagonal = j * 8 + own_lane % 4 * 2 + e % 2 - l;
          if (diagonal >= 0 && diagonal < W) own[diagonal * 17 + l] = sum[b][m][j][e];
        }
      __syncwarp();
      const int l = l0 + own_warp * 32 + m * 16 + own_lane % 16;
      if (l < s.shorter)
#pragma unroll 4
        for (int i = own_lane / 16; i < W; i += 2) parts[((written_bands + b) * W + i) * s.shorter + l] = own[i * 17 + own_lane % 16];
      __syncwarp();
    }
#endif
}

}  // namespace dst_ops
