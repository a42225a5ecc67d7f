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
  const int64_t P = std::max(I, O), L = std::min(I, O), tile = kernel.few_tile;
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
  std::vector<T> add(O + tile, T(0));
  if (bias != nullptr) kernel.convert(bias, O, add.data());
  torch::stable::parallel_for(0, (O + tile - 1) / tile, 1, [&](int64_t begin, int64_t stop) {
    // Row r of a token: input (r mod P), or zero. Each thread makes its own, as rows out of another's cache would come too late.
    const int64_t wide = 4 * tile, ld = P + wide;
    T* const x = scratch<T, rows_id>(B * ld);
    for (int64_t b = 0; b < B; ++b) {
      T* const row = x + b * ld;
      kernel.convert(in + b * I, I, row);
      std::fill_n(row + I, P - I, T(0));
      for (int64_t r = P; r < ld; r += P) std::copy_n(row, std::min(P, ld - r), row + r);
    }
    std::vector<int> met_start(K);
    std::vector<long> met_slot(K);
    for (int64_t i = begin * tile, end = std::min(stop * tile, O); i < end; i += wide) {
      // All but those whose rows i + start, ..., i + start + wide - 1 are zeros, which are L ... P - 1 and from P + L on.
      const auto before = [&](int64_t row) { return std::lower_bound(start.begin(), start.end(), row - i) - start.begin(); };
      const int64_t gap = scatter ? before(L) : K, resumed = std::max(gap, before(P - wide + 1)), last = scatter ? before(P + L) : K;
      int64_t met = 0;
      for (const auto& [from, to] : {std::pair(int64_t(0), std::min(gap, last)), std::pair(resumed, last)})
        for (int64_t k = from; k < to; ++k, ++met) met_start[met] = start[k], met_slot[met] = slot[k];
      kernel.few(x, ld, B, values, L, P, {met_start.data(), met_slot.data(), met, 1}, scatter, i, std::min(wide, end - i), add.data() + i, out + i, O);
    }
  });
}

}  // namespace
}  // namespace dst_ops
