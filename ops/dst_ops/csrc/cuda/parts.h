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

// At most `wanted` splits of at least `least` tokens.
inline int splits_of(int64_t tokens, int64_t wanted, int64_t least) {
  return static_cast<int>(std::max<int64_t>(1, std::min({wanted, tokens / least, int64_t(65535)})));
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
