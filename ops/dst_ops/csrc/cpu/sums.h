// Sums of absolute values along all candidate diagonals of some rows of a matrix. Included by ops.cpp only.
#pragma once

#include <algorithm>
#include <vector>

#include "isa.h"

namespace dst_ops {
namespace {

// Candidates that a thread takes at a time: their sums stay in the first-level cache.
constexpr int64_t sums_tile = 256;

// block [M, columns]: columns first_column ... of a matrix [M, N]; sums [P]. With t = (column - row) mod P, entries of one row
// lie at adjacent t; the candidate is t itself if M < N and -t mod P if not. Every t meets its columns in their order.
template <typename In, typename T = typename SumOf<In>::type>
void diagonal_sums(const In* block, T* sums, int64_t columns, int64_t first_column, int64_t M, int64_t N) {
  const int64_t P = std::max(M, N);
  torch::stable::parallel_for(0, (P + sums_tile - 1) / sums_tile, 1, [&](int64_t begin, int64_t stop) {
    for (int64_t t0 = begin * sums_tile; t0 < std::min(P, stop * sums_tile); t0 += sums_tile) {
      const int64_t t1 = std::min(P, t0 + sums_tile);
      T tile[sums_tile] = {};
      // The block's first column meets the row at t = t1 - 1 - step, and its j-th at j more, of which [from, to) lie in the tile.
      int64_t row = (first_column + 1 + P - t1) % P;
      for (int64_t step = 0; step < t1 - t0 + columns - 1; ++step, row = row + 1 < P ? row + 1 : 0) {
        const int64_t from = std::max<int64_t>(0, step + 1 - (t1 - t0)), to = std::min(columns, step + 1);
        if (row < M) kernels<In>().add_absolute(block + row * columns + from, to - from, tile + (t1 - t0 - 1 - step + from));
      }
      for (int64_t t = t0; t < t1; ++t) sums[M < N || t == 0 ? t : P - t] = tile[t - t0];
    }
  });
}

}  // namespace
}  // namespace dst_ops
