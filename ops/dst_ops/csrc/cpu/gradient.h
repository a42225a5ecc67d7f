// The gradient of the stored values: features in the vector lanes. Included by ops.cpp only.
//
// grad[k, l] = sum over tokens b of shorter[b, l] * longer[b, (l + offset k) mod P]. A tile of adjacent l of some tokens
// stays in registers while diagonals pass by, each with its window of the longer rows. A vector load that straddles 32
// bytes costs half as much again, so diagonals are sorted by the offset's remainder: a tile is moved by that much, once
// for all diagonals of one remainder, and every window begins at a multiple of 32 bytes.
#pragma once

#include <algorithm>
#include <vector>

#include "isa.h"
#include "scratch.h"
#include "units.h"

namespace dst_ops {
namespace {

// Diagonals whose windows stay in the first-level cache together, and their gradients of some tiles in the second.
constexpr int64_t window_bytes = 24 * 1024, gradient_bytes = 256 * 1024;

// to[0..count) = row[(from + i) mod period] where from + i lies in [0, length), 0 elsewhere; length is at most period.
template <typename In, typename T = typename SumOf<In>::type>
void copy_periodic(const In* row, int64_t length, int64_t period, int64_t from, int64_t count, T* to) {
  while (count > 0) {
    const int64_t at = (from % period + period) % period, many = std::min(count, (at < length ? length : period) - at);
    if (at < length) kernels<In>().convert(row + at, many, to);
    else std::fill_n(to, many, T(0));
    from += many, to += many, count -= many;
  }
}

// longer [B, P], shorter [B, L], grad [K, L].
template <typename In, typename T = typename SumOf<In>::type>
void gradient(const In* shorter, const In* longer, T* grad, const Units& units, int64_t B, int64_t P, int64_t L) {
  struct Diagonal {
    int64_t offset, slot;
  };
  const Kernels<In>& kernel = kernels<In>();
  const int64_t tile = kernel.tile, group = kernel.rows, align = 32 / sizeof(T);
  std::vector<Diagonal> diagonals;
  diagonals.reserve(units.list.size() * units.width);
  for (const Unit& u : units.list)
    for (int64_t d = 0; d < units.width; ++d) diagonals.push_back({u.offset + d, u.slot + d});

  // Chunks of nearly equal numbers of diagonals.
  const int64_t K = static_cast<int64_t>(diagonals.size());
  const int64_t chunks = std::min(K, (group * P * int64_t(sizeof(T)) + window_bytes - 1) / window_bytes);
  const auto chunk_begin = [&](int64_t c) { return K * c / chunks; };
  std::vector<int64_t> chunk_low(chunks), chunk_high(chunks);  // offsets
  for (int64_t c = 0; c < chunks; ++c) {
    const auto begin = diagonals.begin() + chunk_begin(c), end = diagonals.begin() + chunk_begin(c + 1);
    chunk_low[c] = begin->offset / align * align;
    chunk_high[c] = (end - 1)->offset;
    std::sort(begin, end, [&](const Diagonal& a, const Diagonal& b) {
      return a.offset % align != b.offset % align ? a.offset % align < b.offset % align : a.offset < b.offset;
    });
  }
  std::vector<int> start(K);
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t k = chunk_begin(c); k < chunk_begin(c + 1); ++k)
      start[k] = static_cast<int>(diagonals[k].offset / align * align - chunk_low[c]);

  // Tile t of a diagonal covers l = t * tile - remainder ...; every (chunk, tile) is computed by itself, in one order of
  // tokens, so that the result does not depend on who computes it.
  const int64_t tiles = (L + align - 1 + tile - 1) / tile;
  torch::stable::parallel_for(0, chunks * tiles, 1, [&](int64_t begin, int64_t stop) {
    while (begin < stop) {
      const int64_t c = begin / tiles, k0 = chunk_begin(c), k1 = chunk_begin(c + 1), t0 = begin % tiles;
      const int64_t most = std::max<int64_t>(1, gradient_bytes / ((k1 - k0) * tile * int64_t(sizeof(T))));
      const int64_t t1 = std::min({tiles, t0 + most, t0 + stop - begin});
      begin += t1 - t0;

      const int64_t many = (t1 - t0) * tile, ld_short = align + many, ld_long = (many + chunk_high[c] - chunk_low[c] + align) / align * align;
      T *const shorts = scratch<T, sums_id>(group * ld_short), *const longs = scratch<T, rows_id>(group * ld_long);
      T* const sums = scratch<T, packed_id>(many * (k1 - k0));
      std::fill_n(sums, many * (k1 - k0), T(0));
      for (int64_t b = 0; b < B; b += group) {
        for (int64_t r = 0; r < group; ++r) {
          const int64_t l = t0 * tile;
          if (b + r < B) {
            // The short row is zero outside [0, L): a period that the tile cannot leave.
            copy_periodic(shorter + (b + r) * L, L, 2 * (L + tile + align), l - align, ld_short, shorts + r * ld_short);
            copy_periodic(longer + (b + r) * P, P, P, l + chunk_low[c], ld_long, longs + r * ld_long);
          } else {
            std::fill_n(shorts + r * ld_short, ld_short, T(0));
            std::fill_n(longs + r * ld_long, ld_long, T(0));
          }
        }
        for (int64_t t = 0; t < t1 - t0; ++t)
          for (int64_t k = k0, next; k < k1; k = next) {
            const int64_t remainder = diagonals[k].offset % align;
            for (next = k + 1; next < k1 && diagonals[next].offset % align == remainder;) ++next;
            kernel.accumulate(shorts + align + t * tile - remainder, ld_short, longs + t * tile, ld_long, start.data() + k,
                              sums + (t * (k1 - k0) + k - k0) * tile, next - k);
          }
      }
      for (int64_t k = k0; k < k1; ++k)
        for (int64_t t = t0; t < t1; ++t) {
          const int64_t l = t * tile - diagonals[k].offset % align, from = std::max<int64_t>(l, 0), to = std::min(l + tile, L);
          if (from < to) std::copy_n(sums + ((t - t0) * (k1 - k0) + k - k0) * tile + from - l, to - from, grad + diagonals[k].slot * L + from);
        }
    }
  });
}

}  // namespace
}  // namespace dst_ops
