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
// Bands, where one instruction shifts numbers from one vector into another (AVX-512): the sums of neighbouring diagonals stay in
// registers while tokens pass by, and windows that overlap are shifted out of the same two vectors.
#pragma once

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "isa.h"
#include "layout.h"
#include "memory.h"
#include "shares.h"
#include "units.h"

namespace dst_ops {
namespace {

// Windows of single diagonals that stay in the first-level cache together, and gradients of some tiles in the second.
int64_t window_bytes() { return (wide_first_level() ? 32 : 24) * 1024; }
constexpr int64_t gradient_bytes = 512 * 1024;

// Of a small layer, parts of the tokens are summed apart, so that there are items for many threads: of as many tokens at least.
constexpr int64_t enough_items = 64, part_tokens = 256;

// Rows that pass by the sums of a band.
constexpr int64_t band_rows = 16;

// to[r][i] = feature (from + i) mod period of token b + r, or 0 if that is none, for `rows` tokens and i below count. Rows of `to` are
// gradient_stride apart, and written as transpose_rows() does where tokens lie side by side.
template <typename In, typename T = typename SumOf<In>::type>
void copy_periodic(const Operand<In>& in, int64_t b, int64_t rows, int64_t period, int64_t from, int64_t count, T* to) {
  constexpr int64_t ld = gradient_stride / sizeof(T);
  for (int64_t i = 0, many; i < count; i += many) {
    const int64_t at = ((from + i) % period + period) % period;
    many = std::min(count - i, (at < in.features ? in.features : period) - at);
    if (i < period && at < in.features && in.layout.feature_major) {
      kernels<In>().transpose_rows(in.at(b, at), in.step(), rows, many, to + i);
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      T* const row = to + r * ld + i;
      if (i >= period) std::copy_n(row - period, many, row);
      else if (at < in.features) kernels<In>().convert(in.at(b + r, at), many, row);
      else std::fill_n(row, many, T(0));
    }
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

struct Gradient {
  Work work;
  std::function<void()> finish;  // after all work is done
};

// dy [B, M], x [B, N] of one shape but for the last dimension, grad [K, L]. Items are shared out once, not taken over: who comes
// later would have to copy the rows again.
template <typename In, typename T = typename SumOf<In>::type>
Gradient gradient(const Operand<In>& dy, const Operand<In>& x, T* grad, const Units& units) {
  const Operand<In>&shorter = dy.features >= x.features ? x : dy, &longer = dy.features >= x.features ? dy : x;
  const int64_t P = longer.features, L = shorter.features;
  const Kernels<In>& kernel = kernels<In>();
  const bool band = units.width % 4 == 0 && kernel.accumulate_band != nullptr;
  const int64_t width = band ? std::gcd<int64_t>(units.width, 16) : 1, rows = band ? band_rows : kernel.gradient_rows, tile = band ? kernel.band_tile : kernel.gradient_tile;
  const int64_t align = band ? 1 : (kernel.vector_bytes == 64 && wide_first_level() ? 64 : 32) / sizeof(T), ld = gradient_stride / sizeof(T);
  const int64_t window = band ? ld / 2 : std::min<int64_t>(window_bytes() / (rows * sizeof(T)), ld * 3 / 4);
  // A window may begin `beyond` after the last offset of a chunk's part, and reach as far beyond that.
  const int64_t beyond = width + 2 * kernel.vector_bytes / int64_t(sizeof(T)) + align;
  std::vector<Chunk> chunks = chunks_of(units, width, P, window, align);

  // Tile t of a diagonal covers l = t * tile - remainder ...; every (part, chunk, tile) is computed by itself, in one order of
  // tokens, so that the result does not depend on who computes it.
  const int64_t tiles = (L + align - 1 + tile - 1) / tile, entries = static_cast<int64_t>(units.list.size()) * units.width * L;
  const int64_t items = static_cast<int64_t>(chunks.size()) * tiles;
  // Tokens that are copied together: where they lie side by side, whole squares of what vectors transpose.
  const Layout& runs = shorter.layout.feature_major ? shorter.layout : longer.layout;
  const int64_t copied = runs.feature_major ? std::lcm<int64_t>(rows, kernel.vector_bytes / sizeof(T)) : rows, copies = runs.tiles(copied);
  const int64_t most_parts = entries == 0 ? 1 : std::max<int64_t>(1, std::min(runs.tokens / part_tokens, runs.tokens * P / entries));
  const int64_t parts = std::min(most_parts, (enough_items - 1) / std::max<int64_t>(1, items) + 1);
  T* const sums_of_parts = parts > 1 ? scratch<T, parts_id>(parts * entries) : grad;
  auto run = [=, &kernel, chunks = std::move(chunks)](int64_t begin, int64_t stop) {
    T *const shorts = scratch<T, sums_id>(copied * ld), *const longs = scratch<T, rows_id>(copied * ld);
    while (begin < stop) {
      const Chunk& chunk = chunks[begin / tiles % chunks.size()];
      const int64_t part = begin / items;
      T* const out = sums_of_parts + part * entries;
      const int64_t K = static_cast<int64_t>(chunk.diagonals.size()), t0 = begin % tiles;
      const int64_t most = std::clamp<int64_t>(gradient_bytes / (K * tile * int64_t(sizeof(T))), 1, (ld - window - 2 * beyond) / tile);
      const int64_t t1 = std::min({tiles, t0 + most, t0 + stop - begin});
      begin += t1 - t0;

      const int64_t many = (t1 - t0) * tile, span = many + chunk.span + beyond, l0 = t0 * tile;
      T* const sums = scratch<T, gradient_id>(many * K);
      std::fill_n(sums, many * K, T(0));
      for (int64_t c = copies * part / parts, end = copies * (part + 1) / parts; c < end; ++c) {
        const int64_t b = runs.begin(c, copied), now = runs.count(c, copied);
        const int64_t next = std::min(c + 1, end - 1), next_b = runs.begin(next, copied), next_many = next > c ? runs.count(next, copied) : 0;
        // The shorter rows are zero outside [0, L): a period that the tile cannot leave.
        copy_periodic(shorter, b, now, 2 * (L + tile + align), l0 - align, align + many, shorts);
        copy_periodic(longer, b, now, P, l0 + chunk.low, span, longs);
        for (int64_t r = now; r % rows != 0 && !band; ++r) {
          std::fill_n(shorts + r * ld, align + many, T(0));
          std::fill_n(longs + r * ld, span, T(0));
        }
        for (int64_t r = 0; r < now; r += rows)
          for (int64_t t = 0; t < t1 - t0; ++t) {
            if (r == 0) {  // the next tokens come from memory meanwhile
              const int64_t at = (l0 + chunk.low) % P;
              prefetch(shorter, next_b, next_many, l0 + t * tile, l0 + (t + 1) * tile);
              prefetch(longer, next_b, next_many, at + span * t / (t1 - t0), at + span * (t + 1) / (t1 - t0));
            }
            const T *const s = shorts + r * ld + align + t * tile, *const u = longs + r * ld + t * tile;
            T* const to = sums + t * K * tile;
            if (!band) kernel.accumulate(s, u, chunk.classes.data(), static_cast<long>(chunk.classes.size()), chunk.start.data(), to);
            else for (int64_t k = 0; k < K; k += width) kernel.accumulate_band(s, u + chunk.start[k], std::min(rows, now - r), width, to + k * tile);
          }
      }
      for (int64_t k = 0; k < K; ++k)
        for (int64_t t = t0; t < t1; ++t) {
          const Chunk::Diagonal& d = chunk.diagonals[k];
          const int64_t l = t * tile - d.offset % align, from = std::max<int64_t>(l, 0), to = std::min(l + tile, L);
          if (from < to) std::copy_n(sums + ((t - t0) * K + k) * tile + from - l, to - from, out + d.slot * L + from);
        }
    }
  };
  const auto finish = [=] {
    if (parts == 1) return;
    torch::stable::parallel_for(0, entries, 1 << 14, [&](int64_t begin, int64_t stop) {
      std::copy(sums_of_parts + begin, sums_of_parts + stop, grad + begin);
      for (int64_t p = 1; p < parts; ++p)
        for (int64_t i = begin; i < stop; ++i) grad[i] += sums_of_parts[p * entries + i];
    });
  };
  return {{parts * items, std::move(run)}, finish};
}

}  // namespace
}  // namespace dst_ops
