// How the tokens of a tensor lie in memory. Included by ops.cpp only.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dst_ops {
namespace {

// A transposed tensor counts as feature-major from this many tokens side by side on; reference.py has the same number.
constexpr int64_t least_run = 64;

// Of [..., S, features] with `tokens` tokens in all: the features of a token lie side by side, or (feature-major, as in a
// transposed tensor) the S tokens of a feature. Either is read and written as it is.
struct Layout {
  int64_t tokens;
  int64_t run;  // S if feature-major, all tokens otherwise
  bool feature_major;

  // Tokens are taken in tiles that lie within a run: tile t holds count(t, size) tokens from begin(t, size) on.
  int64_t tiles(int64_t size) const { return tokens == 0 ? 0 : tokens / run * of_run(size); }
  int64_t begin(int64_t t, int64_t size) const { return t / of_run(size) * run + t % of_run(size) * size; }
  int64_t count(int64_t t, int64_t size) const { return std::min(size, run - t % of_run(size) * size); }

  // Where feature f of token b is, and how far it is from there to the next token, or, feature-major, to the next feature.
  int64_t at(int64_t b, int64_t f, int64_t features) const { return feature_major ? (b / run * features + f) * run + b % run : b * features + f; }
  int64_t step(int64_t features) const { return feature_major ? run : features; }

 private:
  int64_t of_run(int64_t size) const { return (run + size - 1) / size; }
};

template <typename In>
struct Operand {
  const In* data;
  int64_t features;
  Layout layout;

  const In* at(int64_t b, int64_t f) const { return data + layout.at(b, f, features); }
  int64_t step() const { return layout.step(features); }
};

// Features begin ... end - 1 of tokens b ... b + count - 1, of one run, into the second-level cache.
template <typename In>
void prefetch(const Operand<In>& in, int64_t b, int64_t count, int64_t begin, int64_t end) {
  const int64_t rows = in.layout.feature_major ? end - begin : count, columns = in.layout.feature_major ? count : end - begin;
  const In* row = in.at(b, begin);
  for (int64_t r = 0; r < rows; ++r, row += in.step())
    for (int64_t c = 0; c < columns; c += 64 / int64_t(sizeof(In))) __builtin_prefetch(row + c, 0, 2);
}

}  // namespace
}  // namespace dst_ops
