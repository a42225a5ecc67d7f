// The product with few tokens: features in the vector lanes. Included by ops.cpp only.
//
// Reading the weights takes most of the time, so they are read once, where they are, by all tokens of a group, and
// nothing is packed or transposed. Forms, starts and the order of sums are those of product.h: a token's result does
// not depend, bit for bit, on how many there are.
#pragma once

#include <algorithm>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "units.h"

namespace dst_ops {
namespace {

// Up to this many tokens: measured, the break-even with product().
constexpr int64_t few_tokens = 32;

template <typename In, typename T = typename SumOf<In>::type>
void few_product(const In* in, const In* values, const In* bias, In* out, const Units& units, int64_t B, int64_t I, int64_t O, bool scatter) {
  const Kernels<In>& kernel = kernels<In>();
  const int64_t P = std::max(I, O), L = std::min(I, O), tile = kernel.tile;
  const int64_t K = static_cast<int64_t>(units.list.size()) * units.width;
  std::vector<int> start(K);
  std::vector<long> slot(K);
  for (int64_t k = 0; k < K; ++k) {
    const int64_t at = scatter ? K - 1 - k : k;
    const Unit& u = units.list[at / units.width];
    const int64_t d = at % units.width;
    start[k] = static_cast<int>(scatter ? P - u.offset - d : u.offset + d);
    slot[k] = u.slot + d;
  }
  // Row r: input (r mod P) of a token, or zero.
  const int64_t ld = P + tile;
  T* const x = scratch<T, rows_id>(B * ld);
  std::vector<T> add(O + tile, T(0));
  if (bias != nullptr) kernel.convert(bias, O, add.data());
  for (int64_t b = 0; b < B; ++b) {
    T* const row = x + b * ld;
    kernel.convert(in + b * I, I, row);
    std::fill_n(row + I, P - I, T(0));
    for (int64_t r = P; r < ld; r += P) std::copy_n(row, std::min(P, ld - r), row + r);
  }
  torch::stable::parallel_for(0, (O + tile - 1) / tile, 1, [&](int64_t begin, int64_t stop) {
    const Diagonals diagonals{start.data(), slot.data(), K, 1};
    for (int64_t t = begin; t < stop; ++t)
      kernel.few(x, ld, B, values, L, P, diagonals, scatter, t * tile, std::min(tile, O - t * tile), add.data() + t * tile, out + t * tile, O);
  });
}

}  // namespace
}  // namespace dst_ops
