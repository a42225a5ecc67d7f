// The second stage of a gradient: splits of the tokens write sums of their own, which are added in order.
#pragma once

#include "launch.h"

namespace dst_ops {

// sums[i] = parts[0][i] + parts[1][i] + ...: always in this order.
static __global__ void __launch_bounds__(256) add_parts(const float* __restrict__ parts, float* __restrict__ sums, int64_t count, int splits) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count; i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    float sum = 0.0f;
    for (int part = 0; part < splits; ++part) sum += parts[part * count + i];
    sums[i] = sum;
  }
}

// Splits of at least `least` tokens for a gradient that takes so many blocks without: as many as fill the processors a whole number
// of times best, since all blocks take equally long. Each split's sums are written and read once more, so few are preferred.
inline int splits_of(int64_t tokens, int64_t blocks, int64_t least, int64_t slots = many_blocks) {
  const int64_t most = std::max<int64_t>(1, std::min({tokens / least, ceil_div(4 * slots, blocks), int64_t(65535)}));
  int64_t best = 1;
  double best_time = 1e30;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const double time = static_cast<double>(ceil_div(blocks * splits, slots)) / static_cast<double>(splits) + 0.002 * static_cast<double>(blocks * splits) / static_cast<double>(slots);
    if (time < 0.98 * best_time) best = splits, best_time = time;
  }
  return static_cast<int>(best);
}

inline Tensor sum_parts(const Tensor& parts, const Device& device) {
  if (parts.size(0) == 1) return torch::stable::reshape(parts, {parts.size(1), parts.size(2)});
  Tensor sums = torch::stable::new_empty(parts, {parts.size(1), parts.size(2)});
  const int64_t count = sums.numel();
  DST_OPS_LAUNCH(add_parts, dim3(static_cast<unsigned>(std::min<int64_t>(ceil_div(count, 256), 65535))), dim3(256), 0, device.stream, read<float>(parts),
                 write<float>(sums), count, static_cast<int>(parts.size(0)));
  check_launch();
  return sums;
}

}  // namespace dst_ops
