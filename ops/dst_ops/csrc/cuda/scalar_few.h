// Few tokens, any offsets, CUDA cores. The weights are what there is to read, and warps fetch theirs in the background, before they need
// x. What limits it: instructions, of which a warp spends 27 on a diagonal and eight tokens, and more than that on all else.
#pragma once

#include "scalar.h"

namespace dst_ops {

constexpr int few_warps = 16;
constexpr int few_together = 8, few_stages = 4;  // diagonals whose weights a warp fetches together; of those, on their way
constexpr int few_list = 64;                     // diagonals that a warp lists at a time

// A diagonal as scalar_few needs it. x: bytes to what the first row meets. piece, behind: where its weights begin, in pieces of 16
// bytes, from the diagonal's first on and from all diagonals' first on; of weights that are not aligned the feature that the first row
// meets, and the diagonal. weights: bytes from the first piece to the first row's.
struct FewDiagonal {
  uint32_t x, weights;
  int piece;
  uint32_t behind;
};

// Shared memory of scalar_few: packs of x, of a single token its row; then of each warp the weights that it fetches, in whose place
// it leaves its sums, and its list.
template <typename T, int Tokens, bool Scatter>
struct FewLayout {
  // Of 16 bytes, for the weights of 32 rows. In a scatter they begin anywhere in the first.
  static constexpr int pieces = 32 / pack_size<T> + Scatter;
  static constexpr int lanes = pieces <= 4 ? 4 : pieces <= 8 ? 8 : 16;  // that fetch those of a diagonal
  static constexpr int pitch = pieces * 16, stage = few_together * pitch, ring = few_stages * stage;  // bytes
  static constexpr int warp = ring + few_list * static_cast<int>(sizeof(FewDiagonal));
  static_assert(ring >= Tokens * 32 * 4);
  int x;
  __host__ __device__ explicit FewLayout(int in) : x(((in + 1) * Tokens * static_cast<int>(sizeof(T)) + 15) / 16 * 16) {}
  __host__ __device__ int bytes() const { return x + few_warps * warp; }
};

// grid: blocks of 2^group_bits groups of 32 rows, tiles of tokens. block: lanes, warps. The warps of a group share its diagonals;
// their sums are added in order.
template <typename T, int Tokens, bool Scatter>
__global__ void __launch_bounds__(32 * few_warps, 2)
scalar_few(const T* __restrict__ x, const T* __restrict__ values, const int* __restrict__ offsets, const T* __restrict__ bias, T* __restrict__ y,
           T* __restrict__ before, Sizes s, int group_bits, bool with_gelu) {
  using Layout = FewLayout<T, Tokens, Scatter>;
  constexpr int P = pack_size<T>, size = sizeof(T), token_bytes = Tokens * size;
  DST_OPS_SHARED(memory);
  const int lane = threadIdx.x, warp = threadIdx.y, groups = 1 << group_bits, slices = few_warps >> group_bits, slice = warp >> group_bits;
  const int first_row = (blockIdx.x * groups + (warp & (groups - 1))) * 32, diagonals = s.units * s.band, ring_at = Layout(s.in).x;
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * Tokens;
  unsigned char* ring = memory + ring_at + warp * Layout::warp;
  FewDiagonal* list = reinterpret_cast<FewDiagonal*>(ring + Layout::ring);
  const int row_pieces = s.shorter / P, end_piece = s.longer / P;  // of a diagonal
  const bool whole = s.shorter % P == 0 && (!Scatter || s.longer % P == 0) && s.longer >= 32 + P;

  const auto border = [&](int slice) { return static_cast<int>((static_cast<int64_t>(diagonals) * slice << group_bits) / few_warps); };
  int begin = border(slice), count = 0;
  const int end = border(slice + 1);
  const auto fetch = [&](int stage) {
    if (stage * few_together < count) {
      unsigned char* to = ring + stage % few_stages * Layout::stage;
      if (whole) {
        constexpr int each = 32 / Layout::lanes;  // diagonals at a time
        const int j = lane % Layout::lanes;
#pragma unroll
        for (int i = 0; i < few_together; i += each) {
          const int of_stage = i + lane / Layout::lanes, which = stage * few_together + of_stage;
          int piece = first_row / P + j;
          uint32_t at = static_cast<uint32_t>(begin + which) * row_pieces + piece;
          if (Scatter) {
            const FewDiagonal d = list[which];
            const int past = d.piece + j >= end_piece ? end_piece : 0;
            piece = d.piece + j - past, at = d.behind + j - past;
          }
          if (j < Layout::pieces) {
            unsigned char* target = to + of_stage * Layout::pitch + j * 16;
            if (piece < row_pieces && which < count) copy_async<false>(shared_address(target), reinterpret_cast<const uint4*>(values) + at, true);
            else *reinterpret_cast<uint4*>(target) = make_uint4(0, 0, 0, 0);
          }
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < few_together; ++i) {
          const int which = stage * few_together + i;
          T weight;
          narrow(0.0f, weight);
          if (which < count) {
            const int at = Scatter ? wrapped(list[which].piece + lane, s.longer) : first_row + lane;
            if (at < s.shorter) weight = values[static_cast<int64_t>(Scatter ? list[which].behind : begin + which) * s.shorter + at];
          }
          reinterpret_cast<T*>(to + i * Layout::pitch)[lane] = weight;
        }
      }
    }
    copies_commit();
  };
  // Lists diagonals from `begin` on and asks for the first of their weights; in a gather these are where no offset matters.
  const auto start = [&] {
    const auto fetch_first = [&] {
#pragma unroll
      for (int stage = 0; stage < few_stages; ++stage) fetch(stage);
    };
    count = max(0, min(few_list, end - begin));
    if (!Scatter) fetch_first();
    count = list_diagonals<Scatter, few_list>(offsets, begin, end, first_row, s, [&](int i, int k, int first) {
      const uint32_t at = first * token_bytes;
      if (whole) list[i] = {at, static_cast<uint32_t>(Scatter ? first % P * size : 0), first / P, static_cast<uint32_t>(k) * row_pieces + first / P};
      else list[i] = {at, 0, first, static_cast<uint32_t>(k)};
    });
    // What completes the last four meets nothing but the zeros behind x.
    if (lane < 4 && count + lane < few_list) list[count + lane] = {2u * s.longer * token_bytes, 0, 0, 0};
    __syncwarp();
    if (Scatter) fetch_first();
  };
  await_previous();
  let_next_begin();
  start();
  if constexpr (Tokens == 1) {
    T* row = reinterpret_cast<T*>(memory);
    const int thread = warp * 32 + lane, packed = s.in / P * P;
    for (int i = thread * P; i < packed; i += 32 * few_warps * P) *reinterpret_cast<uint4*>(row + i) = *reinterpret_cast<const uint4*>(x + i);
    if (packed + thread < s.in) row[packed + thread] = x[packed + thread];
    if (thread == 0) narrow(0.0f, row[s.in]);
  } else {
    stage_packs(reinterpret_cast<uint4*>(memory), x, first_token, s.tokens, s.in, 1);
  }
  __syncthreads();
  const uint32_t longer_bytes = s.longer * token_bytes, zeros = s.in * token_bytes;
  float sum[Tokens] = {};
  while (true) {
#pragma unroll 1
    for (int stage = 0; stage * few_together < count; ++stage) {
      copies_wait<few_stages - 1>();
      __syncwarp();
#pragma unroll
      for (int i0 = 0; i0 < few_together; i0 += 4) {
        if (stage * few_together + i0 >= count) break;
        const unsigned char* weights = ring + stage % few_stages * Layout::stage + lane * size;
#pragma unroll
        for (int i = i0; i < i0 + 4; ++i) {
          const FewDiagonal d = list[stage * few_together + i];
          uint32_t at = d.x + lane * token_bytes;
          at = min(at, at - longer_bytes);  // one that is not beyond the end becomes huge
          at = min(at, zeros);              // for what is not there: 0 times a NaN is one
          const float w = wide(*reinterpret_cast<const T*>(weights + i * Layout::pitch + d.weights));
          if constexpr (Tokens == 1) {
            sum[0] = fmaf(w, wide(*reinterpret_cast<const T*>(memory + at)), sum[0]);
          } else {
            float f[P];
            unpack(load_shared(memory + at), f, T());
#pragma unroll
            for (int e = 0; e < P; ++e) sum[e] = fmaf(w, f[e], sum[e]);
          }
        }
      }
      __syncwarp();
      fetch(stage + few_stages);
    }
    begin += few_list;
    if (begin >= end) break;
    start();
  }
  float* sums = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int e = 0; e < Tokens; ++e) sums[e * 32 + lane] = sum[e];
  __syncthreads();
  for (int i = warp; i < groups * Tokens; i += few_warps) {
    const int group = i / Tokens, e = i % Tokens, row = (blockIdx.x * groups + group) * 32 + lane;
    float total[1] = {};
#pragma unroll 4
    for (int part = 0; part < slices; ++part) total[0] += reinterpret_cast<const float*>(memory + ring_at + ((part << group_bits) + group) * Layout::warp)[e * 32 + lane];
    if (row < s.out) store_row<T>(y, before, total, bias, row, first_token + e, with_gelu, s);
  }
}

}  // namespace dst_ops
