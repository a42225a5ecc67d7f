// The gradient of the stored values: features in the vector lanes. Included by ops.cpp only.
//
// grad[k, l] = sum over tokens b of shorter[b, l] * longer[b, (l + offset k) mod P]. Some rows are copied to where they
// neither wrap nor share lines of the first-level cache; then every diagonal is a window of the longer rows.
//
// Single diagonals: a tile of adjacent l of a few tokens stays in registers while diagonals pass by. A vector load that
// straddles what the processor loads at once (64 bytes, or 32) costs half as much again or twice as much, so diagonals are
// sorted by the offset's remainder: a tile is moved by that much, once for all diagonals of one remainder, and every window
// begins at a multiple.
//
// Bands: the sums of neighbouring diagonals stay in registers while tokens pass by, and windows that overlap are shifted
// out of the same two vectors.
#pragma once

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "shares.h"
#include "units.h"

namespace dst_ops {
namespace {

// Windows of single diagonals that stay in the first-level cache together, and gradients of some tiles in the second.
constexpr int64_t window_bytes = 24 * 1024, gradient_bytes = 512 * 1024;

// Rows that pass by the sums of a band.
constexpr int64_t band_rows = 16;

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

// Diagonals whose offsets lie in one part of [0, P), by remainder. Those of a band stay together.
struct Chunk {
  struct Diagonal {
    int64_t offset, slot;
  };
  int64_t low, span;  // offsets low ... low + span
  std::vector<Diagonal> diagonals;
  std::vector<int> start;  // of their windows in the rows from `low` on
  std::vector<Class> classes;
};

std::vector<Chunk> chunks_of(const Units& units, int64_t width, int64_t P, int64_t window, int64_t align) {
  const int64_t count = (P + window - 1) / window;
  std::vector<Chunk> chunks;
  int64_t part = -1;
  for (const Unit& u : units.list)
    for (int64_t d = 0; d < units.width; ++d) {
      const int64_t offset = u.offset + d;
      if (d % width == 0 && offset * count / P != part) {
        part = offset * count / P;
        chunks.push_back({offset / align * align, 0, {}, {}, {}});
      }
      chunks.back().diagonals.push_back({offset, u.slot + d});
      chunks.back().span = offset - chunks.back().low;
    }
  for (Chunk& c : chunks) {
    std::stable_sort(c.diagonals.begin(), c.diagonals.end(), [&](const auto& a, const auto& b) { return a.offset % align < b.offset % align; });
    for (const auto& d : c.diagonals) {
      const int remainder = static_cast<int>(d.offset % align);
      if (c.classes.empty() || c.classes.back().remainder != remainder) c.classes.push_back({remainder, 0});
      c.start.push_back(static_cast<int>(d.offset / align * align - c.low));
      ++c.classes.back().count;
    }
  }
  return chunks;
}

// longer [B, P], shorter [B, L], grad [K, L]. Items are shared out once, not taken over: who comes later would have to copy the
// rows again.
template <typename In, typename T = typename SumOf<In>::type>
Work gradient(const In* shorter, const In* longer, T* grad, const Units& units, int64_t B, int64_t P, int64_t L) {
  const Kernels<In>& kernel = kernels<In>();
  const bool band = units.width % 4 == 0;
  const int64_t width = band ? std::gcd<int64_t>(units.width, 16) : 1, rows = band ? band_rows : kernel.rows, tile = band ? kernel.band_tile : kernel.tile;
  const int64_t align = band ? 1 : (kernel.vector_bytes == 64 && wide_first_level() ? 64 : 32) / sizeof(T), window = band ? gradient_stride / 2 / sizeof(T) : window_bytes / (rows * sizeof(T));
  // A window may begin `beyond` after the last offset of a chunk's part, and reach as far beyond that.
  const int64_t ld = gradient_stride / sizeof(T), beyond = width + 2 * kernel.vector_bytes / int64_t(sizeof(T)) + align;
  std::vector<Chunk> chunks = chunks_of(units, width, P, window, align);

  // Tile t of a diagonal covers l = t * tile - remainder ...; every (chunk, tile) is computed by itself, in one order of
  // tokens, so that the result does not depend on who computes it.
  const int64_t tiles = (L + align - 1 + tile - 1) / tile;
  const int64_t items = static_cast<int64_t>(chunks.size()) * tiles;
  return {items, [=, &kernel, chunks = std::move(chunks)](int64_t begin, int64_t stop) {
    T *const shorts = scratch<T, sums_id>(rows * ld), *const longs = scratch<T, rows_id>(rows * ld);
    while (begin < stop) {
      const Chunk& chunk = chunks[begin / tiles];
      const int64_t K = static_cast<int64_t>(chunk.diagonals.size()), t0 = begin % tiles;
      const int64_t most = std::clamp<int64_t>(gradient_bytes / (K * tile * int64_t(sizeof(T))), 1, (ld - window - 2 * beyond) / tile);
      const int64_t t1 = std::min({tiles, t0 + most, t0 + stop - begin});
      begin += t1 - t0;

      const int64_t many = (t1 - t0) * tile, span = many + chunk.span + beyond, l0 = t0 * tile;
      T* const sums = scratch<T, gradient_id>(many * K);
      std::fill_n(sums, many * K, T(0));
      for (int64_t b = 0; b < B; b += rows) {
        const int64_t now = std::min(rows, B - b), next = b + now, next_many = std::min(rows, B - next);
        for (int64_t r = 0; r < now; ++r) {
          // The short row is zero outside [0, L): a period that the tile cannot leave.
          copy_periodic(shorter + (b + r) * L, L, 2 * (L + tile + align), l0 - align, align + many, shorts + r * ld);
          copy_periodic(longer + (b + r) * P, P, P, l0 + chunk.low, span, longs + r * ld);
        }
        for (int64_t r = now; r < kernel.rows && !band; ++r) {
          std::fill_n(shorts + r * ld, align + many, T(0));
          std::fill_n(longs + r * ld, span, T(0));
        }
        for (int64_t t = 0; t < t1 - t0; ++t) {
          // The next rows come from memory meanwhile.
          const int64_t at = (l0 + chunk.low) % P;
          prefetch(shorter + next * L, L, 0, next_many, l0 + t * tile, l0 + (t + 1) * tile);
          prefetch(longer + next * P, P, 0, next_many, at + span * t / (t1 - t0), at + span * (t + 1) / (t1 - t0));
          const T *const s = shorts + align + t * tile, *const u = longs + t * tile;
          T* const to = sums + t * K * tile;
          if (!band) kernel.accumulate(s, u, chunk.classes.data(), static_cast<long>(chunk.classes.size()), chunk.start.data(), to);
          else for (int64_t k = 0; k < K; k += width) kernel.accumulate_band(s, u + chunk.start[k], now, width, to + k * tile);
        }
      }
      for (int64_t k = 0; k < K; ++k)
        for (int64_t t = t0; t < t1; ++t) {
          const Chunk::Diagonal& d = chunk.diagonals[k];
          const int64_t l = t * tile - d.offset % align, from = std::max<int64_t>(l, 0), to = std::min(l + tile, L);
          if (from < to) std::copy_n(sums + ((t - t0) * K + k) * tile + from - l, to - from, grad + d.slot * L + from);
        }
    }
  }};
}

}  // namespace
}  // namespace dst_ops
