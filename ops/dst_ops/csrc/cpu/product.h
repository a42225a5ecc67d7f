// The product with many tokens: tokens in the vector lanes. Included by ops.cpp only.
//
// Output i of a token is a sum over units e (one diagonal or a band of neighbours) of weights times input rows
// i + start[e], ..., and all tokens of a tile read the same rows: so a tile of tokens is transposed once, and every load
// after that is an aligned one. Where the input is feature-major (see layout.h) tiles are copied instead, and so is the output.
//
// Two forms. Gather (the output is the short side): output i reads row (i + offset) mod P of the input, and entries of a
// diagonal are numbered along the output. Scatter (the output is the long side): output i reads row (i - offset) mod P
// if that is below L, and entries are numbered along the input. With start = P - offset - (width - 1) and the unit's
// diagonals last to first the second is the first with rows L ... P - 1 of the input zero.
#pragma once

#include <algorithm>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "codegen.h"
#include "isa.h"
#include "layout.h"
#include "memory.h"
#include "shares.h"
#include "units.h"

namespace dst_ops {
namespace {

// A block: as few tiles of outputs as are whole lines of y, also of numbers of 16 bits. They share the input rows which a chunk of
// sections spans. If units meet many rows, those of a chunk stay in the first-level cache; if few, it may cost less to take them from
// the second than to store and load sums between chunks: with tiles of 14 outputs, which do much with a row, where the first-level
// cache has no room for weights beside a chunk.
struct Chunking {
  int64_t least, bytes;  // from how many bytes on, and of how many
};
Chunking chunking(int64_t vector_bytes) {
  if (vector_bytes < 64) return {32 * 1024, 24 * 1024};
  return {(wide_first_level() ? 64 : 192) * 1024, 32 * 1024};
}

// Tokens whose tiles take turns at a block, while its weights are in the second-level cache.
constexpr int64_t tokens_in_turns = 32;

// Most weights packed at a time: 8 MiB in fp32.
constexpr int64_t segment_weights = 1 << 21;

// What the gradient of a bias is made of: sums over each tile of tokens, features in rows that have room for whole vectors.
constexpr int64_t row_of_sums(int64_t features) { return (features + 15) / 16 * 16; }

// out [B, O] in the layout of the input. token_sums: if not null, [tiles of tokens, row_of_sums(I)], receives those of the input.
// before: other work for the threads.
template <typename In, typename T = typename SumOf<In>::type>
void product(const Operand<In>& in, const In* values, const In* bias, In* out, const Units& units, int64_t O, bool scatter,
             T* token_sums = nullptr, const Work& before = {}) {
  const Kernels<In>& kernel = kernels<In>();
  const Layout& layout = in.layout;
  const int64_t I = in.features, P = std::max(I, O), L = std::min(I, O), tokens = kernel.tokens, outputs = kernel.outputs;
  const int64_t width = units.width, unit = width * outputs, count = static_cast<int64_t>(units.list.size());
  std::vector<int> start(count);
  std::vector<long> slot(count);
  for (int64_t e = 0; e < count; ++e) {
    const Unit& u = units.list[scatter ? count - 1 - e : e];
    start[e] = static_cast<int>(scatter ? P - u.offset - (width - 1) : u.offset);
    slot[e] = u.slot;
  }
  const int64_t reach = outputs + width - 1, sections = (P + outputs + section_rows - 1) / section_rows;
  const int vectors = kernel.tokens * int(sizeof(T)) / kernel.vector_bytes;
  // What a tile of outputs and the next one read, rows and weights: so much has to stay for the rows that both read.
  const int64_t held = (std::min(P, count * (reach + outputs)) * tokens + 2 * count * unit) * int64_t(sizeof(T)), nonzero = scatter ? L : P;
  const auto [least_chunked, chunk_bytes] = chunking(kernel.vector_bytes);
  const int64_t chunks = held * nonzero / P <= least_chunked ? 1 : (held + chunk_bytes - 1) / chunk_bytes, chunk = (sections + chunks - 1) / chunks;
  const auto program = program_for<T>(start, width, P + outputs, kernel.outputs, vectors, kernel.vector_bytes);

  // Units that meet rows of sections begin ... end - 1.
  const auto meeting = [&](int64_t begin, int64_t end) {
    const int64_t first = std::upper_bound(start.begin(), start.end(), begin * section_rows - reach) - start.begin();
    const int64_t last = std::lower_bound(start.begin(), start.end(), end * section_rows) - start.begin();
    return std::pair(first, begin < end ? last : first);
  };

  // Row r of the tile of outputs from i on is row (i + r) mod P of the input: i + r before the wrap, i + r - P after it.
  // Sections that meet zeros only are left out.
  const int64_t together = std::max<int64_t>(1, tokens_in_turns / tokens), token_tiles = layout.tiles(tokens), tiles = (O + outputs - 1) / outputs;
  std::vector<Part> parts(2 * tiles);
  for (int64_t p = 0; p < 2 * tiles; ++p) {
    const int64_t i = p / 2 * outputs, wrap = std::min(sections, (P - i) / section_rows), row = p % 2 ? i - P : i;
    const int64_t zeros = p % 2 && nonzero == P ? sections : std::clamp<int64_t>((nonzero - row + section_rows - 1) / section_rows, 0, sections);
    const int64_t begin = p % 2 ? wrap : 0, end = p % 2 ? std::max(wrap, zeros) : std::min(wrap, zeros);
    const auto [first, last] = meeting(begin, end);
    parts[p] = {i, row, begin, end, first, last, 0};
  }
  const int64_t line = 32, block_tiles = line / std::gcd(line, outputs), block_outputs = block_tiles * outputs;
  std::vector<T> add(O + block_outputs, T(0));
  if (bias != nullptr) kernel.convert(bias, O, add.data());

  // The weights of a segment of blocks are packed at a time, so that they take no more memory than x or y.
  const auto read = layout.feature_major ? kernel.copy_in : kernel.transpose_in;
  const auto write = layout.feature_major ? kernel.copy_out : kernel.transpose_out;
  const int64_t most = std::min(layout.tokens * P, segment_weights);
  for (int64_t begin_tile = 0, end_tile; begin_tile < tiles; begin_tile = end_tile) {
    int64_t packed = 0;
    for (end_tile = begin_tile; end_tile < tiles; ++end_tile) {
      Part* const part = &parts[2 * end_tile];
      const int64_t sizes[] = {(part[0].last - part[0].first) * unit + 16, (part[1].last - part[1].first) * unit + 16};
      if (end_tile > begin_tile && (end_tile - begin_tile) % block_tiles == 0 && packed + sizes[0] + sizes[1] > most) break;
      part[0].weights = packed;
      part[1].weights = packed + sizes[0];
      packed += sizes[0] + sizes[1];
    }
    T* const weights = scratch<T, packed_id>(packed);
    const int64_t blocks = (end_tile - begin_tile + block_tiles - 1) / block_tiles;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
      const Diagonals diagonals{start.data(), slot.data(), count, width};
      for (int64_t t = begin_tile + from * block_tiles, end = std::min(begin_tile + to * block_tiles, end_tile); t < end; t += block_tiles)
        kernel.pack(values, L, P, diagonals, scatter, &parts[2 * t], 2 * std::min(block_tiles, end - t), weights);
    });
    const bool first_segment = begin_tile == 0;
    share_out(first_segment ? before : Work(), (token_tiles + together - 1) / together * together * blocks, [&](const auto& take) {
      // Rows 0 ... P - 1, and as many on each side as sections reach beyond.
      const int64_t ahead = section_rows, after = reach + section_rows, all_rows = ahead + P + after;
      T *const first_x = scratch<T, rows_id>(together * all_rows * tokens) + ahead * tokens, *const sums = scratch<T, sums_id>((block_outputs + 16) * tokens);
      for (int64_t i = 0; i < together; ++i) std::fill_n(first_x + (i * all_rows + I) * tokens, (P - I) * tokens, T(0));
      std::vector<int64_t> held(together, -1);  // tiles of tokens that x holds
      for (int64_t item = 0, stop = 0;; ++item) {
        if (item == stop) std::tie(item, stop) = take(blocks * together);  // not one by one: an atomic step waits for all stores before it
        if (item == stop) break;
        const int64_t turn = item % together, token_tile = item / (together * blocks) * together + turn, block = item / together % blocks;
        if (token_tile >= token_tiles) continue;
        T* const x = first_x + turn * all_rows * tokens;
        const int64_t b = layout.begin(token_tile, tokens), many = layout.count(token_tile, tokens);
        const int64_t t0 = begin_tile + block * block_tiles, t1 = std::min(t0 + block_tiles, end_tile), i = t0 * outputs, i_end = std::min(O, t1 * outputs);
        const bool sums_too = token_sums != nullptr && first_segment && block == 0;
        if (token_tile != held[turn] || sums_too) {
          held[turn] = token_tile;
          read(in.at(b, 0), in.step(), many, I, x, sums_too ? token_sums + token_tile * row_of_sums(I) : nullptr);
          for (int64_t r = -ahead; r < 0; ++r) std::copy_n(x + (r % P + P) % P * tokens, tokens, x + r * tokens);
          for (int64_t r = P; r < P + after; ++r) std::copy_n(x + (r - P) * tokens, tokens, x + r * tokens);
        }

        // A part of the next tokens' inputs comes from memory meanwhile.
        const int64_t calls = (sections + chunk - 1) / chunk * (t1 - t0);
        const int64_t next = std::min(token_tile + together, token_tiles - 1), f0 = I * block / blocks, f1 = I * (block + 1) / blocks;
        const int64_t next_many = next > token_tile ? layout.count(next, tokens) : 0;
        const int64_t next_b = layout.begin(next, tokens);
        int64_t call = 0;
        uint64_t begun = 0;  // tiles
        for (int64_t c = 0; c < sections; c += chunk)
          for (int64_t t = t0; t < t1; ++t, ++call) {
            const auto part_of = [&](int64_t from, int64_t to) { return std::pair(from + (to - from) * call / calls, from + (to - from) * (call + 1) / calls); };
            if (layout.feature_major) {
              const auto [from, to] = part_of(f0, f1);
              prefetch(in, next_b, next_many, from, to);
            } else {
              const auto [from, to] = part_of(next_b, next_b + next_many);
              prefetch(in, from, to - from, f0, f1);
            }
            for (const Part* part = &parts[2 * t]; part != &parts[2 * t] + 2; ++part) {
              const int64_t s0 = std::max(c, part->begin), s1 = std::min(c + chunk, part->end);
              if (s0 >= s1) continue;
              const T *const rows = x + part->row * tokens, *const weight = weights + part->weights;
              T* const to = sums + (t - t0) * outputs * tokens;
              const bool continues = begun >> (t - t0) & 1;
              begun |= uint64_t(1) << (t - t0);
              if (program->ready()) {
                program->run(rows, weight - part->first * unit, to, s0, s1, continues);
              } else {
                if (!continues) std::fill_n(to, outputs * tokens, T(0));
                const auto [first, last] = meeting(s0, s1);
                const Diagonals diagonals{start.data() + first, slot.data() + first, last - first, width};
                kernel.multiply(rows, diagonals, weight + (first - part->first) * unit, to, s0 * section_rows, s1 * section_rows);
              }
            }
          }
        for (int64_t t = t0; t < t1; ++t)
          if (!(begun >> (t - t0) & 1)) std::fill_n(sums + (t - t0) * outputs * tokens, outputs * tokens, T(0));
        write(sums, many, i_end - i, add.data() + i, out + layout.at(b, i, O), layout.step(O));
      }
    });
  }
}

}  // namespace
}  // namespace dst_ops
