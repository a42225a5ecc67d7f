// The three gradients of y = x W^T + bias at once. Included by ops.cpp only.
#pragma once

#include <algorithm>

#include "few.h"
#include "gradient.h"
#include "memory.h"
#include "product.h"
#include "sums.h"

namespace dst_ops {
namespace {

// dy [B, M], x [B, N], dx [B, N] in the layout of dy, dvalues [K, L], dbias [M]. The gradient of the values and the product that
// gives dx run in one parallel region: a thread that was quicker with its share of the first takes over tokens of the second. Sums
// for the bias are taken of numbers of dy that the product has just loaded.
template <typename In, typename T = typename SumOf<In>::type>
void backward(const Operand<In>& dy, const Operand<In>& x, const In* values, In* dx, T* dvalues, T* dbias, const Units& units) {
  const Kernels<In>& kernel = kernels<In>();
  const int64_t B = dy.layout.tokens, M = dy.features, N = x.features, rows = dy.layout.tiles(kernel.tokens), ld = row_of_sums(M);
  T* const sums = scratch<T, token_sums_id>(rows * ld);
  const auto [work, finish] = gradient(dy, x, dvalues, units);
  if (B > few_tokens) {
    product<In>(dy, values, nullptr, dx, units, N, M < N, sums, work);
  } else {
    torch::stable::parallel_for(0, work.count, 1, work.run);
    few_product<In>(dy.data, values, nullptr, dx, units, B, M, N, M < N);
    for (int64_t r = 0, b = 0; r < rows; ++r, b += kernel.tokens)
      kernel.transpose_in(dy.at(b, 0), M, std::min<int64_t>(kernel.tokens, B - b), M, scratch<T, rows_id>(M * kernel.tokens), sums + r * ld);
  }
  finish();
  std::fill_n(dbias, M, T(0));
  torch::stable::parallel_for(0, (M + sums_tile - 1) / sums_tile, 1, [&](int64_t begin, int64_t stop) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t f = begin * sums_tile; f < std::min(M, stop * sums_tile); ++f) dbias[f] += sums[r * ld + f];
  });
}

}  // namespace
}  // namespace dst_ops
