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
#include "memory.h"
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

// Most tokens that are transposed at a time for the gradient of bands.
constexpr int64_t band_tokens = 512, band_block = 8;

// The same for bands of a multiple of band_diagonals: tokens in the lanes, so that neighbouring diagonals share loads.
template <typename In, typename T = typename SumOf<In>::type>
void band_gradient(const In* shorter, const In* longer, T* grad, const Units& units, int64_t B, int64_t P, int64_t L) {
  const Kernels<In>& kernel = kernels<In>();
  const int64_t tokens = kernel.tokens, rows = kernel.band_rows, width = units.width, tiles = std::min(band_tokens, B + tokens - 1) / tokens;
  // [tile of tokens][feature][token], with features 0 ... again behind the last of the longer, zeros behind the shorter;
  // the same feature of different tiles must not fall on the same lines of the cache.
  const auto stride = [&](int64_t features) { return (features / 32 * 32 + 32 + 11) * tokens; };
  const int64_t stride_short = stride(L + rows), stride_long = stride(P + rows + width);
  T *const shorts = scratch<T, rows_id>(tiles * stride_short), *const longs = scratch<T, packed_id>(tiles * stride_long);
  if (B == 0) std::fill_n(grad, int64_t(units.list.size()) * width * L, T(0));
  for (int64_t b0 = 0; b0 < B; b0 += tiles * tokens) {
    const int64_t now = std::min(tiles, (B - b0 + tokens - 1) / tokens);
    torch::stable::parallel_for(0, now, 1, [&](int64_t begin, int64_t stop) {
      for (int64_t tile = begin; tile < stop; ++tile) {
        const int64_t b = b0 + tile * tokens, many = std::min(tokens, B - b);
        T *const s = shorts + tile * stride_short, *const u = longs + tile * stride_long;
        kernel.transpose_in(shorter + b * L, L, many, L, s);
        std::fill_n(s + L * tokens, rows * tokens, T(0));
        kernel.transpose_in(longer + b * P, P, many, P, u);
        for (int64_t r = P; r < P + rows + width; ++r) std::copy_n(u + (r - P) * tokens, tokens, u + r * tokens);
      }
    });
    const int64_t block = band_block * rows;
    torch::stable::parallel_for(0, (L + block - 1) / block, 1, [&](int64_t begin, int64_t stop) {
      std::vector<T> sums(rows * band_diagonals), tile(width * block);
      for (int64_t l0 = begin * block; l0 < std::min(L, stop * block); l0 += block) {
        const int64_t many = std::min(block, L - l0);
        for (const Unit& unit : units.list) {
          for (int64_t l = 0; l < many; l += rows)
            for (int64_t d = 0; d < width; d += band_diagonals) {
              const int64_t row = (l0 + l + unit.offset + d) % P;
              kernel.accumulate_band(shorts + (l0 + l) * tokens, stride_short, longs + row * tokens, stride_long, now, sums.data());
              for (int64_t e = 0; e < band_diagonals; ++e)
                for (int64_t r = 0; r < rows; ++r) tile[(d + e) * block + l + r] = sums[r * band_diagonals + e];
            }
          for (int64_t d = 0; d < width; ++d) {
            T* const to = grad + (unit.slot + d) * L + l0;
            for (int64_t l = 0; l < many; ++l) to[l] = b0 == 0 ? tile[d * block + l] : to[l] + tile[d * block + l];
          }
        }
      }
    });
  }
}

// Diagonals whose offsets lie in one part of [0, P), by remainder.
struct Chunk {
  struct Diagonal {
    int64_t offset, slot;
  };
  int64_t low;
  std::vector<Diagonal> diagonals;
  std::vector<int> start;  // of their windows in the rows from `low` on
  std::vector<Class> classes;
};

inline std::vector<Chunk> chunks_of(const Units& units, int64_t P, int64_t window, int64_t align) {
  const int64_t count = (P + window - 1) / window;
  std::vector<Chunk> chunks;
  int64_t part = -1;
  for (const Unit& u : units.list)
    for (int64_t offset = u.offset; offset < u.offset + units.width; ++offset) {
      if (offset * count / P != part) {
        part = offset * count / P;
        chunks.push_back({offset / align * align, {}, {}, {}});
      }
      chunks.back().diagonals.push_back({offset, u.slot + offset - u.offset});
    }
  for (Chunk& c : chunks) {
    std::stable_sort(c.diagonals.begin(), c.diagonals.end(), [&](const auto& a, const auto& b) { return a.offset % align < b.offset % align; });
    for (const auto& d : c.diagonals) {
      if (const int remainder = d.offset % align; c.classes.empty() || c.classes.back().remainder != remainder) c.classes.push_back({remainder, 0});
      c.start.push_back(static_cast<int>(d.offset / align * align - c.low));
      ++c.classes.back().count;
    }
  }
  return chunks;
}

// longer [B, P], shorter [B, L], grad [K, L].
template <typename In, typename T = typename SumOf<In>::type>
void gradient(const In* shorter, const In* longer, T* grad, const Units& units, int64_t B, int64_t P, int64_t L) {
  if (units.width % band_diagonals == 0) return band_gradient(shorter, longer, grad, units, B, P, L);
  const Kernels<In>& kernel = kernels<In>();
  const int64_t tile = kernel.tile, rows = kernel.rows, align = 32 / sizeof(T), ld = gradient_stride / sizeof(T);
  const int64_t window = window_bytes / (rows * int64_t(sizeof(T)));
  const std::vector<Chunk> chunks = chunks_of(units, P, window, align);

  // Tile t of a diagonal covers l = t * tile - remainder ...; every (chunk, tile) is computed by itself, in one order of
  // tokens, so that the result does not depend on who computes it.
  const int64_t tiles = (L + align - 1 + tile - 1) / tile;
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()) * tiles, 1, [&](int64_t begin, int64_t stop) {
    T *const shorts = scratch<T, sums_id>(rows * ld), *const longs = scratch<T, rows_id>(rows * ld);
    while (begin < stop) {
      const Chunk& chunk = chunks[begin / tiles];
      const int64_t K = static_cast<int64_t>(chunk.diagonals.size()), t0 = begin % tiles;
      const int64_t most = std::clamp<int64_t>(gradient_bytes / (K * tile * int64_t(sizeof(T))), 1, (ld - window - 2 * align) / tile);
      const int64_t t1 = std::min({tiles, t0 + most, t0 + stop - begin});
      begin += t1 - t0;

      const int64_t many = (t1 - t0) * tile, span = many + window + align, l0 = t0 * tile;
      T* const sums = scratch<T, packed_id>(many * K);
      std::fill_n(sums, many * K, T(0));
      for (int64_t b = 0; b < B; b += rows) {
        for (int64_t r = 0; r < rows; ++r)
          if (b + r < B) {
            // The short row is zero outside [0, L): a period that the tile cannot leave.
            copy_periodic(shorter + (b + r) * L, L, 2 * (L + tile + align), l0 - align, align + many, shorts + r * ld);
            copy_periodic(longer + (b + r) * P, P, P, l0 + chunk.low, span, longs + r * ld);
          } else {
            std::fill_n(shorts + r * ld, align + many, T(0));
            std::fill_n(longs + r * ld, span, T(0));
          }
        for (int64_t t = 0; t < t1 - t0; ++t) {
          // The next rows come from memory meanwhile.
          const int64_t next = b + rows, next_many = std::clamp<int64_t>(B - next, 0, rows), at = (l0 + chunk.low) % P;
          prefetch(shorter + next * L, L, 0, next_many, l0 + t * tile, l0 + (t + 1) * tile);
          prefetch(longer + next * P, P, 0, next_many, at + span * t / (t1 - t0), at + span * (t + 1) / (t1 - t0));
          kernel.accumulate(shorts + align + t * tile, longs + t * tile, chunk.classes.data(), static_cast<long>(chunk.classes.size()), chunk.start.data(),
                            sums + t * K * tile);
        }
      }
      for (int64_t k = 0; k < K; ++k)
        for (int64_t t = t0; t < t1; ++t) {
          const auto& d = chunk.diagonals[k];
          const int64_t l = t * tile - d.offset % align, from = std::max<int64_t>(l, 0), to = std::min(l + tile, L);
          if (from < to) std::copy_n(sums + ((t - t0) * K + k) * tile + from - l, to - from, grad + d.slot * L + from);
        }
    }
  });
}

}  // namespace
}  // namespace dst_ops
