// The gradient of a bias: sums over the tokens. One pass over dy at the speed of memory; torch's own reduction along the first dimension
// takes four times as long on an H200.
#include "launch.h"

namespace dst_ops {

constexpr int sums_threads = 256, sums_lanes = 8;          // rows that a block reads at once
constexpr int sums_pieces = sums_threads / sums_lanes;     // of 16 bytes, of a row
constexpr int most_splits = 256, least_tokens = 64;        // of the tokens, of a split

// parts[split][column]. grid: blocks of columns, splits. V: numbers that a thread takes at once, 16 bytes or one where rows do not allow that.
template <typename T, int V>
__global__ void __launch_bounds__(sums_threads, 4) sum_tokens(const T* __restrict__ dy, float* __restrict__ parts, int64_t tokens, int columns) {
  DST_OPS_SHARED(memory);
  float* sums = reinterpret_cast<float*>(memory);  // [lane][piece][V]
  const int piece = threadIdx.x % sums_pieces, row = threadIdx.x / sums_pieces, column = (blockIdx.x * sums_pieces + piece) * V;
  const int64_t begin = tokens * blockIdx.y / gridDim.y, end = tokens * (blockIdx.y + 1) / gridDim.y;
  float sum[V] = {};
  if (column < columns) {
#pragma unroll 8  // loads on their way
    for (int64_t token = begin + row; token < end; token += sums_lanes) {
      const T* from = dy + token * columns + column;
      float v[V];
      if constexpr (V == 1) v[0] = wide(*from);
      else unpack(*reinterpret_cast<const uint4*>(from), v, T());
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += v[i];
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) sums[(row * sums_pieces + piece) * V + i] = sum[i];
  __syncthreads();
  for (int i = threadIdx.x; i < sums_pieces * V; i += sums_threads) {
    float total = 0.0f;
#pragma unroll
    for (int lane = 0; lane < sums_lanes; ++lane) total += sums[lane * sums_pieces * V + i];
    const int at = blockIdx.x * sums_pieces * V + i;
    if (at < columns) parts[static_cast<int64_t>(blockIdx.y) * columns + at] = total;
  }
}

// sums[column] over all splits, in one order. grid: blocks of 32 columns.
static __global__ void __launch_bounds__(sums_threads, 4) sum_splits(const float* __restrict__ parts, float* __restrict__ sums, int columns, int splits) {
  DST_OPS_SHARED(memory);
  float* of_lane = reinterpret_cast<float*>(memory);  // [lane][column]
  const int lane = threadIdx.x / 32, column = blockIdx.x * 32 + threadIdx.x % 32;
  float sum = 0.0f;
  if (column < columns) {
#pragma unroll 8
    for (int split = lane; split < splits; split += sums_threads / 32) sum += parts[static_cast<int64_t>(split) * columns + column];
  }
  of_lane[threadIdx.x] = sum;
  __syncthreads();
  if (lane > 0 || column >= columns) return;
  for (int other = 1; other < sums_threads / 32; ++other) sum += of_lane[other * 32 + threadIdx.x];
  sums[column] = sum;
}

namespace {

Tensor sum_of_rows(const Tensor& dy) {
  const int64_t columns = features(dy), tokens = dy.numel() / columns;
  STD_TORCH_CHECK(columns <= int64_t(1) << 23, "dst_ops: dy has ", columns, " features, expected 1 to 2^23");
  const Device device(dy);
  const Tensor rows = packed_rows(dy);
  Tensor sums = torch::stable::new_empty(dy, {columns}, ScalarType::Float);
  for_type(dy.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    constexpr int pack = 16 / sizeof(T);
    const bool whole = columns % pack == 0;
    const int64_t blocks = ceil_div(columns, sums_pieces * (whole ? pack : 1));
    const int64_t splits = std::max<int64_t>(1, std::min({tokens / least_tokens, ceil_div(4 * many_blocks, blocks), int64_t(most_splits)}));
    Tensor parts = torch::stable::new_empty(dy, {splits, columns}, ScalarType::Float);
    DST_OPS_LAUNCH((whole ? sum_tokens<T, pack> : sum_tokens<T, 1>), dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(splits)), dim3(sums_threads),
                   sums_threads * (whole ? pack : 1) * 4, device.stream, read<T>(rows), write<float>(parts), tokens, static_cast<int>(columns));
    check_launch();
    DST_OPS_LAUNCH(sum_splits, dim3(static_cast<unsigned>(ceil_div(columns, 32))), dim3(sums_threads), sums_threads * 4, device.stream, read<float>(parts), write<float>(sums),
                   static_cast<int>(columns), static_cast<int>(splits));
    check_launch();
  });
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dst_ops, DST_OPS_DEVICE, m) { m.impl("cuda_sum_of_rows", TORCH_BOX(&sum_of_rows)); }

}  // namespace dst_ops
