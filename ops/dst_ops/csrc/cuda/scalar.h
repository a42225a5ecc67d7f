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
  for (int i = thread; i < packs * pitch; i += threads) {
    const int pack = i / pitch, feature = i - pack * pitch;
    const int64_t token = first + pack * P;
    union { uint4 whole; T part[P]; } q;
    q.whole = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int e = 0; e < P; ++e)
      if (feature < features && token + e < tokens) q.part[e] = x[(token + e) * features + feature];
    to[i] = q.whole;
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

// Shared memory of scalar_product: packs of x, the warps' lists, sums of the slices but the first.
template <typename T>
struct ScalarLayout {
  int packs, lists, sums;
  __host__ __device__ ScalarLayout(int in, int groups, int rows, int slices)
      : packs(groups * (in + 1) * 16),
        lists(rows / 32 * slices * scalar_segment * static_cast<int>(sizeof(Diagonal))),
        sums((slices - 1) * rows * groups * pack_size<T> * 4) {}
  __host__ __device__ int bytes() const { return packs + lists + sums; }
};

// grid: tiles of Groups * pack_size tokens, blocks of rows. block: rows (a multiple of 32) x slices of the diagonals; with few
// tokens the weights are most of what is read, and slices share that among more threads.
// before, if there is a GELU: also keeps what it was applied to.
template <typename T, int Groups, bool Scatter>
__global__ void __launch_bounds__(Groups == 1 ? 512 : 256, 2)
scalar_product(const T* __restrict__ x, const T* __restrict__ values, const int* __restrict__ offsets, const T* __restrict__ bias,
               T* __restrict__ y, T* __restrict__ before, Sizes s, bool with_gelu) {
  constexpr int P = pack_size<T>, tile = Groups * P;
  DST_OPS_SHARED(memory);
  const int rows = blockDim.x, slices = blockDim.y, slice = threadIdx.y, lane = threadIdx.x & 31, pitch = s.in + 1;
  const ScalarLayout<T> layout(s.in, Groups, rows, slices);
  uint4* packs = reinterpret_cast<uint4*>(memory);
  const int warp = (slice * rows + threadIdx.x) / 32;
  Diagonal* list = reinterpret_cast<Diagonal*>(memory + layout.packs) + warp * scalar_segment;
  float* sums = reinterpret_cast<float*>(memory + layout.packs + layout.lists);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * tile;
  const int diagonals = s.units * s.band;
  const int begin = static_cast<int64_t>(diagonals) * slice / slices, end = static_cast<int64_t>(diagonals) * (slice + 1) / slices;

  stage_packs(packs, x, first_token, s.tokens, s.in, Groups);
  __syncthreads();
  for (int block = blockIdx.y * rows; block < s.out; block += gridDim.y * rows) {
    const int row = block + threadIdx.x;
    float sum[tile] = {};
    for (int k0 = begin; k0 < end; k0 += scalar_segment) {
      const int count = list_diagonals<Scatter>(list, offsets, k0, end, row - lane, s);
      __syncwarp();
#pragma unroll (Groups == 1 ? 4 : 1)
      for (int i = 0; i < count; ++i) {
        const Diagonal d = list[i];
        const int met = wrapped(Scatter ? row - d.offset : row + d.offset, s.longer);
        const bool present = row < s.out && (!Scatter || met < s.shorter);
        const float weight = present ? wide(values[static_cast<int64_t>(d.slot) * s.shorter + (Scatter ? met : row)]) : 0.0f;
        const int feature = present ? met : s.in;  // the zeros: 0 times what is there could be a NaN
#pragma unroll
        for (int g = 0; g < Groups; ++g) {
          float f[P];
          unpack(load_shared(packs + g * pitch + feature), f, T());
#pragma unroll
          for (int e = 0; e < P; ++e) sum[g * P + e] = fmaf(weight, f[e], sum[g * P + e]);
        }
      }
      __syncwarp();
    }
    if (slices > 1) {
      if (slice > 0)
        for (int e = 0; e < tile; ++e) sums[((slice - 1) * tile + e) * rows + threadIdx.x] = sum[e];
      __syncthreads();
      if (slice == 0)
        for (int i = 0; i < slices - 1; ++i)
#pragma unroll
          for (int e = 0; e < tile; ++e) sum[e] += sums[(i * tile + e) * rows + threadIdx.x];
      __syncthreads();
    }
    if (slice == 0 && row < s.out) {
      const float b = bias ? wide(bias[row]) : 0.0f;
#pragma unroll
      for (int e = 0; e < tile; ++e) {
        const int64_t at = (first_token + e) * s.out + row;
        if (first_token + e < s.tokens) {
          if (before) narrow(sum[e] + b, before[at]);
          narrow(with_gelu ? gelu(sum[e] + b) : sum[e] + b, y[at]);
        }
      }
    }
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
