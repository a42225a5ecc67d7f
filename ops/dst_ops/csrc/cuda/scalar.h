// Any offsets, CUDA cores. A tile of tokens lies in shared memory, 16 bytes of neighbouring tokens of one feature together
// ("pack"): threads take neighbouring rows of the result, so that whatever a diagonal's offset, the packs that a warp reads are
// adjacent and meet every bank once. What limits it: one such read for 4 (fp32) or 8 multiply-adds.
#pragma once

#include "geometry.h"
#include "numbers.h"

namespace dst_ops {

constexpr int scalar_segment = 128;  // diagonals that a warp lists at a time

// Rows of `features` numbers, of which `left` are there, as a pack for each feature, and one of zeros behind the last. Rows that are
// not there repeat the last one: a product does not keep their sums, a gradient multiplies them by 0 (an infinite sum may so become a NaN).
// Whole: pack_size rows are there.
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
