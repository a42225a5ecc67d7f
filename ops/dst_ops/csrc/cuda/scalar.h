// Any offsets, CUDA cores. A tile of tokens lies in shared memory, 16 bytes of neighbouring tokens of one feature together
// ("pack"): threads take neighbouring rows of the result, so that whatever a diagonal's offset, the packs that a warp reads are
// adjacent and meet every bank once. What limits it: one such read for 4 (fp32) or 8 multiply-adds.
#pragma once

#include "geometry.h"
#include "numbers.h"

namespace dst_ops {

constexpr int scalar_segment = 128;  // diagonals that a warp lists at a time

// Rows of `features` numbers, of which `left` are there, as a pack for each feature, and one of zeros behind the last. Rows that are
// not there repeat the last one. Whole: pack_size rows are there.
template <typename T, bool Whole>
__device__ __forceinline__ void stage_pack(uint4* to, const T* from, int features, int left) {
  constexpr int P = pack_size<T>;
  union Pack { uint4 whole; T part[P]; };
  using Word = typename WordOf<2 * sizeof(T)>::type;
  union Two { Word whole; T part[2]; };
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const int twos = features % 2 == 0 ? features / 2 : 0;  // rows of an odd number of features are not aligned
  const auto row = [&](int e) { return (Whole ? e : min(e, left - 1)) * features; };
#pragma unroll (Whole ? 2 : 1)
  for (int i = thread; i < twos; i += threads) {
    Pack q[2];
#pragma unroll
    for (int e = 0; e < P; ++e) {
      Two token;
      token.whole = *reinterpret_cast<const Word*>(from + row(e) + 2 * i);
      q[0].part[e] = token.part[0], q[1].part[e] = token.part[1];
    }
    // Half of the lanes write their second pack first: eight lanes together then meet every bank once.
    const int odd = i / 4 % 2;
    to[2 * i + odd] = odd ? q[1].whole : q[0].whole;
    to[2 * i + 1 - odd] = odd ? q[0].whole : q[1].whole;
  }
#pragma unroll 1
  for (int feature = 2 * twos + thread; feature <= features; feature += threads) {
    Pack q;
    q.whole = make_uint4(0, 0, 0, 0);
    if (feature < features) {
#pragma unroll
      for (int e = 0; e < P; ++e) q.part[e] = from[row(e) + feature];
    }
    to[feature] = q.whole;
  }
}

// x[first : first + packs * pack_size] as packs [packs][features + 1]; the feature after the last is zero.
template <typename T>
__device__ __forceinline__ void stage_packs(uint4* to, const T* x, int64_t first, int64_t tokens, int features, int packs) {
  constexpr int P = pack_size<T>;
  for (int pack = 0; pack < packs; ++pack, first += P, to += features + 1) {
    if (first + P <= tokens) stage_pack<T, true>(to, x + first * features, features, P);
    else stage_pack<T, false>(to, x + first * features, features, static_cast<int>(tokens - first));
  }
}

// Goes over those of diagonals [begin, begin + Most) before `end` that meet the warp's 32 rows; their number. put(i, k, first): the
// i-th is diagonal k, and the first row meets feature `first`; lane j meets the one j further on, modulo the longer side.
template <bool Scatter, int Most, typename Put>
__device__ __forceinline__ int list_diagonals(const int* offsets, int begin, int end, int first_row, const Sizes& s, const Put& put) {
  const int lane = threadIdx.x & 31;
  int units[Most / 32], count = 0;  // all on their way together
#pragma unroll
  for (int i = 0; i < Most / 32; ++i) {
    const int k = begin + i * 32 + lane;
    units[i] = k < end ? offsets[s.band == 1 ? k : k / s.band] : 0;
  }
#pragma unroll
  for (int i = 0; i < Most / 32; ++i) {
    if (begin + i * 32 >= end) break;
    const int k = begin + i * 32 + lane, offset = diagonal_of(units[i], s) + (s.band == 1 ? 0 : k % s.band);
    const int first = wrapped(Scatter ? first_row - offset : first_row + offset, s.longer);
    const bool met = k < end && (!Scatter || meets(first, 32, s.shorter, s.longer));
    const unsigned mask = __ballot_sync(~0u, met);
    if (met) put(count + __popc(mask & ((1u << lane) - 1)), k, first);
    count += __popc(mask);
  }
  return count;
}

struct Diagonal {
  int slot, first;
};

// Shared memory of scalar_product: packs of x, the warps' lists.
struct ScalarLayout {
  int packs, lists;
  __host__ __device__ ScalarLayout(int in, int groups) : packs(groups * (in + 1) * 16), lists(256 / 32 * scalar_segment * static_cast<int>(sizeof(Diagonal))) {}
  __host__ __device__ int bytes() const { return packs + lists; }
};

// Writes a thread's sums of one row, tokens first_token, ....
// before, if there is a GELU: also keeps what it was applied to.
template <typename T, int N>
__device__ __forceinline__ void store_row(T* y, T* before, const float (&sum)[N], const T* bias, int row, int64_t first_token, bool with_gelu, const Sizes& s) {
  const float b = bias ? wide(bias[row]) : 0.0f;
  int64_t at = first_token * s.out + row;
#pragma unroll
  for (int e = 0; e < N; ++e, at += s.out) {
    if (first_token + e >= s.tokens) return;
    if (before) narrow(sum[e] + b, before[at]);
    narrow(with_gelu ? gelu(sum[e] + b) : sum[e] + b, y[at]);
  }
}

// grid: tiles of Groups * pack_size tokens, blocks of 256 rows.
template <typename T, int Groups, bool Scatter>
__global__ void __launch_bounds__(256, 2)
scalar_product(const T* __restrict__ x, const T* __restrict__ values, const int* __restrict__ offsets, const T* __restrict__ bias,
               T* __restrict__ y, T* __restrict__ before, Sizes s, bool with_gelu) {
  constexpr int P = pack_size<T>, tile = Groups * P;
  DST_OPS_SHARED(memory);
  const int rows = blockDim.x, lane = threadIdx.x & 31, pitch = s.in + 1;
  const ScalarLayout layout(s.in, Groups);
  uint4* packs = reinterpret_cast<uint4*>(memory);
  Diagonal* list = reinterpret_cast<Diagonal*>(memory + layout.packs) + threadIdx.x / 32 * scalar_segment;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * tile;
  const int diagonals = s.units * s.band;

  stage_packs(packs, x, first_token, s.tokens, s.in, Groups);
  __syncthreads();
  for (int block = blockIdx.y * rows; block < s.out; block += gridDim.y * rows) {
    const int row = block + threadIdx.x;
    float sum[tile] = {};
    for (int k0 = 0; k0 < diagonals; k0 += scalar_segment) {
      const int count = list_diagonals<Scatter, scalar_segment>(offsets, k0, diagonals, row - lane, s, [&](int i, int k, int first) { list[i] = {k, first}; });
      __syncwarp();
      // The feature that a diagonal meets, and its weight there, which is on its way while the diagonal before is multiplied.
      const auto look = [&](int i, int& feature) {
        const Diagonal d = list[i < count ? i : 0];
        const int met = wrapped(d.first + lane, s.longer);
        const bool present = i < count && row < s.out && (!Scatter || met < s.shorter);
        feature = present ? met : s.in;  // the zeros: 0 times what is there could be a NaN
        T weight;
        narrow(0.0f, weight);
        if (present) weight = values[static_cast<int64_t>(d.slot) * s.shorter + (Scatter ? met : row)];
        return weight;
      };
      int feature = s.in, next_feature;
      T weight, next_weight;
      if (count > 0) weight = look(0, feature);
#pragma unroll (Groups == 1 ? 4 : 1)
      for (int i = 0; i < count; ++i) {
        next_weight = look(i + 1, next_feature);
        const float w = wide(weight);
#pragma unroll
        for (int g = 0; g < Groups; ++g) {
          float f[P];
          unpack(load_shared(packs + g * pitch + feature), f, T());
#pragma unroll
          for (int e = 0; e < P; ++e) sum[g * P + e] = fmaf(w, f[e], sum[g * P + e]);
        }
        weight = next_weight, feature = next_feature;
      }
      __syncwarp();
    }
    if (row < s.out) store_row<T>(y, before, sum, bias, row, first_token, with_gelu, s);
  }
}

constexpr int few_warps = 16;
constexpr int few_together = 8, few_stages = 4;  // diagonals whose weights a warp fetches together; of those, on their way
constexpr int few_list = 64;                     // diagonals that a warp lists at a time

// A diagonal as scalar_few needs it. x: bytes to what the first row meets. piece, behind: where its weights begin, in pieces of 16
// bytes, from the diagonal's first on and from all diagonals' first on. weights: bytes from there to the first row's.
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

// Few tokens: the weights are what there is to read, and warps fetch theirs in the background, before they need x.
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

constexpr int scalar_gradient_threads = 256;
template <typename T>
constexpr int scalar_gradient_diagonals = sizeof(T) == 4 ? 16 : 24;  // what a thread has registers for

// parts[split][k][l] = sum over the split's tokens of shorter[token][l] longer[token][(l + o) mod P].
// grid: blocks of l, of diagonals, splits of the tokens. Shared memory: a pack of all features of the longer side.
template <typename T>
__global__ void __launch_bounds__(scalar_gradient_threads, 2)
scalar_gradient(const T* __restrict__ shorter, const T* __restrict__ longer, const int* __restrict__ offsets, float* __restrict__ parts, Sizes s) {
  constexpr int P = pack_size<T>, D = scalar_gradient_diagonals<T>;
  DST_OPS_SHARED(memory);
  uint4* packs = reinterpret_cast<uint4*>(memory);
  const int l = blockIdx.x * blockDim.x + threadIdx.x, k0 = blockIdx.y * D, diagonals = s.units * s.band;
  const int64_t begin = s.tokens * blockIdx.z / gridDim.z, end = s.tokens * (blockIdx.z + 1) / gridDim.z;
  int met[D];
  float sum[D] = {};
#pragma unroll
  for (int i = 0; i < D; ++i) {
    const int k = k0 + i;
    met[i] = k < diagonals && l < s.shorter ? wrapped(l + first_diagonal(offsets, k / s.band, s) + k % s.band, s.longer) : s.longer;
  }
  for (int64_t token = begin; token < end; token += P) {
    __syncthreads();
    stage_packs(packs, longer, token, end, s.longer, 1);
    __syncthreads();
    float other[P];
#pragma unroll
    for (int e = 0; e < P; ++e) other[e] = token + e < end && l < s.shorter ? wide(shorter[(token + e) * s.shorter + l]) : 0.0f;
#pragma unroll
    for (int i = 0; i < D; ++i) {
      float f[P];
      unpack(load_shared(packs + met[i]), f, T());
#pragma unroll
      for (int e = 0; e < P; ++e) sum[i] = fmaf(other[e], f[e], sum[i]);
    }
  }
  if (l >= s.shorter) return;
#pragma unroll
  for (int i = 0; i < D; ++i)
    if (k0 + i < diagonals) parts[(static_cast<int64_t>(blockIdx.z) * diagonals + k0 + i) * s.shorter + l] = sum[i];
}

}  // namespace dst_ops
