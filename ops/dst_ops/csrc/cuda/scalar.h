// Any offsets, CUDA cores. A tile of tokens lies in shared memory, 16 bytes of neighbouring tokens of one feature together
// ("pack"): threads take neighbouring rows of the result, so that whatever a diagonal's offset, the packs that a warp reads are
// adjacent and meet every bank once. What limits it: one such read for 4 (fp32) or 8 multiply-adds.
#pragma once

#include "geometry.h"
#include "numbers.h"

namespace dst_ops {

constexpr int scalar_segment = 128;  // diagonals that a warp lists at a time

// x[first : first + packs * pack_size] as packs [packs][pitch]; the feature after the last is zero.
template <typename T>
__device__ __forceinline__ void stage_packs(uint4* to, const T* x, int64_t first, int64_t tokens, int features, int packs) {
  constexpr int P = pack_size<T>;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y, pitch = features + 1;
  for (int pack = 0; pack < packs; ++pack) {
    const T* from = x + (first + pack * P) * features;
    const int64_t left = tokens - (first + pack * P);
#pragma unroll 2
    for (int feature = thread; feature < pitch; feature += threads) {
      union { uint4 whole; T part[P]; } q;
      q.whole = make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int e = 0; e < P; ++e)
        if (feature < features && e < left) q.part[e] = from[e * static_cast<int64_t>(features) + feature];
      to[pack * pitch + feature] = q.whole;
    }
  }
}

struct Diagonal {
  int slot, offset;
};

// Lists, in order, those of diagonals [begin, begin + scalar_segment) before `end` that meet the warp's 32 rows; their number.
template <bool Scatter>
__device__ __forceinline__ int list_diagonals(Diagonal* list, const int* offsets, int begin, int end, int first_row, const Sizes& s) {
  const int lane = threadIdx.x & 31;
  int count = 0;
  for (int i = 0; i < scalar_segment; i += 32) {
    const int k = begin + i + lane;
    Diagonal d = {k, 0};
    bool met = k < end;
    if (met) {
      d.offset = first_diagonal(offsets, k / s.band, s) + k % s.band;
      if (Scatter) met = meets(wrapped(first_row - d.offset, s.longer), 32, s.shorter, s.longer);
    }
    const unsigned mask = __ballot_sync(~0u, met);
    if (met) list[count + __popc(mask & ((1u << lane) - 1))] = d;
    count += __popc(mask);
  }
  return count;
}

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
      const int count = list_diagonals<Scatter>(list, offsets, k0, diagonals, row - lane, s);
      __syncwarp();
      // The feature that a diagonal meets, and its weight there, which is on its way while the diagonal before is multiplied.
      const auto look = [&](int i, int& feature) {
        const Diagonal d = list[i < count ? i : 0];
        const int met = wrapped(Scatter ? row - d.offset : row + d.offset, s.longer);
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

constexpr int few_batch = 16;   // weights of a thread that are on their way together
constexpr int few_slices = 16;  // of the diagonals

// Shared memory of scalar_few: the tokens' rows, each with zeros behind it; then, in their place, the slices' sums.
template <typename T>
__host__ __device__ int few_pitch(int in) { return (in / pack_size<T> + 1) * pack_size<T>; }
template <typename T, int Tokens>
__host__ __device__ int few_bytes(int in) {
  const int rows = Tokens * few_pitch<T>(in) * static_cast<int>(sizeof(T)), sums = few_slices * Tokens * 32 * 4;
  return rows > sums ? rows : sums;
}

// Copies rows of x; the loads of four tokens are on their way together.
template <typename T, int Tokens>
__device__ __forceinline__ void stage_rows(T* to, const T* x, int64_t first_token, int pitch, const Sizes& s) {
  constexpr int P = pack_size<T>, together = Tokens < 4 ? Tokens : 4;
  const int thread = threadIdx.y * 32 + threadIdx.x;
  const int left = static_cast<int>(s.tokens - first_token < Tokens ? s.tokens - first_token : Tokens), whole = s.in % P == 0 ? s.in : 0;
#pragma unroll 1
  for (int e0 = 0; e0 < Tokens; e0 += together) {
    const T* from = x + (first_token + e0) * s.in;
    T* row = to + e0 * pitch;
#pragma unroll 1
    for (int i = thread * P; i < whole; i += 32 * few_slices * P) {
      uint4 q[together];
#pragma unroll
      for (int e = 0; e < together; ++e) {
        q[e] = make_uint4(0, 0, 0, 0);
        if (e0 + e < left) q[e] = *reinterpret_cast<const uint4*>(from + static_cast<int64_t>(e) * s.in + i);
      }
#pragma unroll
      for (int e = 0; e < together; ++e) *reinterpret_cast<uint4*>(row + e * pitch + i) = q[e];
    }
#pragma unroll 1
    for (int i = whole + thread; i < pitch; i += 32 * few_slices) {  // what is not aligned, and the zeros
#pragma unroll
      for (int e = 0; e < together; ++e) {
        T v;
        narrow(0.0f, v);
        if (e0 + e < left && i < s.in) v = from[static_cast<int64_t>(e) * s.in + i];
        row[e * pitch + i] = v;
      }
    }
  }
}

// Few tokens: the weights are what there is to read, and threads ask for many of theirs at once, before they need x.
// grid: blocks of 32 rows, tiles of tokens. block: 32 rows x slices of the diagonals, whose sums are added in order.
template <typename T, int Tokens, bool Scatter>
__global__ void __launch_bounds__(32 * few_slices, 2)
scalar_few(const T* __restrict__ x, const T* __restrict__ values, const int* __restrict__ offsets, const T* __restrict__ bias, T* __restrict__ y,
           T* __restrict__ before, Sizes s, bool with_gelu) {
  DST_OPS_SHARED(memory);
  T* xs = reinterpret_cast<T*>(memory);
  const int lane = threadIdx.x, slice = threadIdx.y, row = blockIdx.x * 32 + lane, diagonals = s.units * s.band, pitch = few_pitch<T>(s.in);
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * Tokens;
  float sum[Tokens] = {};
  for (int k0 = slice; k0 - slice < diagonals; k0 += few_slices * few_batch) {  // as often in every slice
    const int mine = k0 + lane % few_batch * few_slices;
    const int offset = mine < diagonals ? first_diagonal(offsets, mine / s.band, s) + mine % s.band : 0;
    const auto met_by = [&](int i, int& met) {
      const int o = __shfl_sync(~0u, offset, i);
      met = wrapped(Scatter ? row - o : row + o, s.longer);
      return k0 + i * few_slices < diagonals && row < s.out && (!Scatter || met < s.shorter);
    };
    T weights[few_batch];
#pragma unroll
    for (int i = 0; i < few_batch; ++i) {
      int met;
      narrow(0.0f, weights[i]);
      if (met_by(i, met)) weights[i] = values[static_cast<int64_t>(k0 + i * few_slices) * s.shorter + (Scatter ? met : row)];
    }
    if (k0 == slice) {
      stage_rows<T, Tokens>(xs, x, first_token, pitch, s);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < few_batch; ++i) {
      if (k0 - slice + i * few_slices >= diagonals) break;
      int met;
      const int feature = met_by(i, met) ? met : s.in;  // the zeros: 0 times what is there could be a NaN
      const float w = wide(weights[i]);
#pragma unroll
      for (int e = 0; e < Tokens; ++e) sum[e] = fmaf(w, wide(xs[e * pitch + feature]), sum[e]);
    }
  }
  __syncthreads();
  float* sums = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int e = 0; e < Tokens; ++e) sums[(slice * Tokens + e) * 32 + lane] = sum[e];
  __syncthreads();
  if (slice >= Tokens || row >= s.out) return;
  float total[1] = {};
#pragma unroll
  for (int i = 0; i < few_slices; ++i) total[0] += sums[(i * Tokens + slice) * 32 + lane];
  store_row<T>(y, before, total, bias, row, first_token + slice, with_gelu, s);
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
