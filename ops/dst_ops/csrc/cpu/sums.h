// Sums of absolute values along all candidate diagonals of some rows of a matrix. Included by ops.cpp only.
#pragma once

#include <algorithm>
#include <vector>

#include "isa.h"

namespace dst_ops {
namespace {

// Candidates that a thread takes at a time: their sums stay in the first-level cache.
constexpr int64_t sums_tile = 256;

// block [rows, N]: rows first_row ... of a matrix [M, N]; sums [P]. With t = (column - row) mod P, entries of one row lie at
// adjacent t; the candidate is t itself if M < N and -t mod P if not.
template <typename In, typename T = typename SumOf<In>::type>
void diagonal_sums(const In* block, T* sums, int64_t rows, int64_t first_row, int64_t M, int64_t N) {
  const int64_t P = std::max(M, N);
  torch::stable::parallel_for(0, (P + sums_tile - 1) / sums_tile, 1, [&](int64_t begin, int64_t stop) {
    for (int64_t t0 = begin * sums_tile; t0 < std::min(P, stop * sums_tile); t0 += sums_tile) {
      const int64_t t1 = std::min(P, t0 + sums_tile);
      T tile[sums_tile] = {};
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t t = t0, end; t < t1; t = end) {
          const int64_t column = (t + first_row + r) % P;
          end = std::min(t1, t + (column < N ? N : P) - column);
          if (column < N) kernels<In>().add_absolute(block + r * N + column, end - t, tile + t - t0);
        }
      for (int64_t t = t0; t < t1; ++t) sums[M < N || t == 0 ? t : P - t] = tile[t - t0];
    }
  });
}

}  // namespace
}  // namespace dst_ops
