// CPU kernels of dst_ops.{linear, linear_transposed, dvalues} on the LibTorch stable ABI.
//
// Both products are one loop. Output entry i of a row is a sum over entries (window start, weight): for the gather form
// (the output is the short side) i = l reads input (l + o) mod P; for the scatter form (the output is the long side)
// i = (l + o) mod P reads input l. In both, a tile of adjacent outputs reads a window of adjacent inputs that starts at
// tile + o or tile - o (mod P). So: pad each row to P + tile entries (zeros up to P, then the beginning again), pack for
// each tile the weights that its windows meet, skip windows that hold zeros only, and multiply. Entries are sorted by
// offset, tiles and rows are independent, and a row's sum has one order: the result does not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "isa.h"

namespace dst_ops {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Active candidate diagonals, ascending; slot is the row of `values` that holds it.
struct Diagonal {
  int64_t offset, slot;
};

std::vector<Diagonal> diagonals(const Tensor& offsets, int64_t band, int64_t candidates) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.scalar_type() == ScalarType::Int, "dst_ops: offsets must be int32 of one dimension");
  STD_TORCH_CHECK(candidates >= 1 && candidates < (int64_t(1) << 31) - 1024, "dst_ops: max(in_features, out_features) is ", candidates, ", expected 1 to 2^31 - 1024");
  STD_TORCH_CHECK(band >= 1 && candidates % band == 0, "dst_ops: band ", band, " must divide ", candidates);
  const Tensor whole = torch::stable::contiguous(offsets);
  const int32_t* units = static_cast<const int32_t*>(whole.const_data_ptr());
  const int64_t count = whole.numel();
  std::vector<char> seen(candidates / band, 0);
  std::vector<Diagonal> result;
  result.reserve(count * band);
  for (int64_t u = 0; u < count; ++u) {
    STD_TORCH_CHECK(units[u] >= 0 && units[u] < candidates / band, "dst_ops: offsets[", u, "] is ", units[u], ", expected 0 to ", candidates / band - 1);
    STD_TORCH_CHECK(!seen[units[u]], "dst_ops: offsets repeats unit ", units[u]);
    seen[units[u]] = 1;
    for (int64_t i = 0; i < band; ++i) result.push_back({units[u] * band + i, u * band + i});
  }
  std::sort(result.begin(), result.end(), [](const Diagonal& a, const Diagonal& b) { return a.offset < b.offset; });
  return result;
}

// The windows of all tiles of one side: tile t owns entries first[t] ... first[t + 1] - 1.
struct Windows {
  std::vector<int64_t> first, slot;
  std::vector<int> start;

  // Where the c-th of `chunks` equal parts of tile t begins.
  int64_t chunk(int64_t t, int64_t c, int64_t chunks) const { return first[t] + (first[t + 1] - first[t]) * c / chunks; }
};

// Neighbouring tiles read nearly the same windows of one chunk of (sorted) offsets: with enough chunks these windows of
// all rows of a register tile stay in a 32 KiB first-level cache.
template <typename T>
int64_t cache_chunks(int64_t rows, int64_t length) {
  return std::max<int64_t>(1, rows * length * static_cast<int64_t>(sizeof(T)) / (24 * 1024));
}

// Tiles over the long side (scatter) when `scatter`, else over the short side; L entries of each row can be non-zero.
Windows windows(const std::vector<Diagonal>& active, int64_t P, int64_t L, int64_t tile, bool scatter) {
  Windows w;
  w.first.push_back(0);
  const int64_t side = scatter ? P : L;
  for (int64_t i = 0; i < side; i += tile) {
    for (const Diagonal& d : active) {
      int64_t start = scatter ? i - d.offset : i + d.offset;  // both lie in [0, P), and a division here would be felt
      if (start < 0) start += P;
      if (start >= P) start -= P;
      if (scatter && start >= L && start + tile <= P) continue;  // reads zeros only
      w.start.push_back(static_cast<int>(start));
      w.slot.push_back(d.slot);
    }
    w.first.push_back(static_cast<int64_t>(w.start.size()));
  }
  return w;
}

// row[0..P + tile) = in[0..length), zeros up to P, then the beginning again.
template <typename T, typename In>
void pad_row(const In* in, int64_t length, int64_t P, int64_t tile, T* row) {
  if constexpr (std::is_same_v<T, In>) {
    std::memcpy(row, in, length * sizeof(T));
  } else {
    for (int64_t i = 0; i < length; ++i) row[i] = static_cast<T>(in[i]);
  }
  std::memset(row + length, 0, (P - length) * sizeof(T));
  for (int64_t i = 0; i < tile; ++i) row[P + i] = row[i % P];
}

template <typename T, typename Out>
void copy_out(const T* from, int64_t count, Out* to) {
  if constexpr (std::is_same_v<T, Out>) {
    std::memcpy(to, from, count * sizeof(T));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Out>(from[i]);
  }
}

// Memory that the thread keeps for its next call (one block for each ID): pages fresh from the system would cost more
// than what is written to them. Its content is undefined.
template <typename T, int ID>
T* scratch(int64_t count) {
  thread_local std::unique_ptr<T[]> block;
  thread_local int64_t capacity = 0;
  if (count > capacity) {
    block.reset(new T[count]);
    capacity = count;
  }
  return block.get();
}
enum { packed_id, rows_id, sums_id };

// in [B, I] -> out [B, O]; T is the type of the sums.
template <typename T, typename In>
void product(const In* in, const In* values, const In* bias, In* out, const std::vector<Diagonal>& active, int64_t B, int64_t I, int64_t O, bool scatter) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t P = std::max(I, O), L = std::min(I, O), tile = kernel.tile;
  const Windows w = windows(active, P, L, tile, scatter);
  const int64_t tiles = static_cast<int64_t>(w.first.size()) - 1, padded = tiles * tile;

  T* const weights = scratch<T, packed_id>(static_cast<int64_t>(w.start.size()) * tile);
  std::vector<T> init(padded, T(0));
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t e = w.first[t]; e < w.first[t + 1]; ++e) {
        const In* v = values + w.slot[e] * L;
        T* to = weights + e * tile;
        const int64_t from = scatter ? w.start[e] : t * tile;  // index into the stored diagonal
        if (from + tile <= L) {
          copy_out(v + from, tile, to);
          continue;
        }
        for (int64_t c = 0; c < tile; ++c) {
          const int64_t l = (from + c) % P;
          to[c] = l < L ? static_cast<T>(v[l]) : T(0);
        }
      }
  });
  if (bias != nullptr)
    for (int64_t i = 0; i < O; ++i) init[i] = static_cast<T>(bias[i]);

  const int64_t group = kernel.rows, ld = P + tile, chunks = cache_chunks<T>(group, I);
  torch::stable::parallel_for(0, (B + group - 1) / group, 1, [&](int64_t begin, int64_t end) {
    T *const rows = scratch<T, rows_id>(group * ld), *const sums = scratch<T, sums_id>(group * padded);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t b = g * group, count = std::min(group, B - b);
      for (int64_t r = 0; r < count; ++r) pad_row(in + (b + r) * I, I, P, tile, rows + r * ld);
      for (int64_t c = 0; c < chunks; ++c)
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t e = w.chunk(t, c, chunks), end_e = w.chunk(t, c + 1, chunks);
          T* sum = sums + t * tile;
          kernel.multiply(rows, count, ld, w.start.data() + e, weights + e * tile, end_e - e,
                          c == 0 ? init.data() + t * tile : sum, c == 0 ? 0 : padded, sum, padded);
        }
      for (int64_t r = 0; r < count; ++r) copy_out(sums + r * padded, O, out + (b + r) * O);
    }
  });
}

// grad [K, L] = sum over rows of shorter[b, l] * longer[b, (l + o) mod P]; T is the type of the sums and of grad.
template <typename T, typename In>
void gradient(const In* shorter, const In* longer, T* grad, const std::vector<Diagonal>& active, int64_t B, int64_t P, int64_t L) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t tile = kernel.tile, K = static_cast<int64_t>(active.size());
  const Windows w = windows(active, P, L, tile, false);
  const int64_t tiles = static_cast<int64_t>(w.first.size()) - 1, padded = tiles * tile, ld = P + tile;
  const int64_t chunks = cache_chunks<T>(kernel.rows, P);
  T* const packed = scratch<T, packed_id>(tiles * K * tile);
  std::memset(packed, 0, tiles * K * tile * sizeof(T));

  // Each thread owns a range of tiles and pads every row for itself: that is little beside K products per entry, needs no
  // waiting for other threads, and leaves the order of sums over rows the same for any number of them.
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    const int64_t group = kernel.rows, first = begin * tile, owned = std::min(end * tile, L) - first;
    T *const longs = scratch<T, rows_id>(group * ld), *const shorts = scratch<T, sums_id>(group * padded);
    std::memset(shorts, 0, group * padded * sizeof(T));  // beyond L it stays 0
    for (int64_t b = 0; b < B; b += group) {
      const int64_t count = std::min(group, B - b);
      for (int64_t r = 0; r < count; ++r) {
        pad_row(longer + (b + r) * P, P, P, tile, longs + r * ld);
        copy_out(shorter + (b + r) * L + first, owned, shorts + r * padded + first);
      }
      for (int64_t c = 0; c < chunks; ++c)
        for (int64_t t = begin; t < end; ++t) {
          const int64_t e = w.chunk(t, c, chunks), end_e = w.chunk(t, c + 1, chunks);
          kernel.accumulate(shorts + t * tile, padded, longs, ld, count, w.start.data() + e, packed + e * tile, end_e - e);
        }
    }
  });
  for (int64_t k = 0; k < K; ++k)
    for (int64_t t = 0; t < tiles; ++t)
      std::memcpy(grad + active[k].slot * L + t * tile, packed + (t * K + k) * tile, std::min(tile, L - t * tile) * sizeof(T));
}

// Calls f with a value of the C++ type of `dtype`.
template <typename F>
void for_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) f(float{});
  else if (dtype == ScalarType::BFloat16) f(BFloat16{});
  else if (dtype == ScalarType::Half) f(Half{});
  else if (dtype == ScalarType::Double) f(double{});
  else STD_TORCH_CHECK(false, "dst_ops: dtype must be float32, bfloat16, float16 or float64");
}

template <typename In>
using Sum = std::conditional_t<std::is_same_v<In, double>, double, float>;

int64_t last_size(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 1 && t.size(t.dim() - 1) >= 1, "dst_ops: x and dy must be [..., features] with at least one feature");
  return t.size(t.dim() - 1);
}

Tensor apply(const Tensor& in, const Tensor& values, const Tensor& offsets, int64_t O, int64_t band, const Tensor* bias, bool scatter) {
  const int64_t I = last_size(in), L = std::min(I, O);
  STD_TORCH_CHECK(O >= 1 && values.dim() == 2, "dst_ops: out_features must be at least 1 and values [K, L]");
  const std::vector<Diagonal> active = diagonals(offsets, band, std::max(I, O));
  STD_TORCH_CHECK(values.size(0) == static_cast<int64_t>(active.size()) && values.size(1) == L, "dst_ops: values is [", values.size(0), ", ",
                  values.size(1), "], expected [", active.size(), ", ", L, "]");
  STD_TORCH_CHECK(values.scalar_type() == in.scalar_type(), "dst_ops: values and x must have one dtype");
  STD_TORCH_CHECK(bias == nullptr || (bias->dim() == 1 && bias->size(0) == O && bias->scalar_type() == in.scalar_type()),
                  "dst_ops: bias must be [", O, "] in the dtype of x");
  const Tensor x = torch::stable::contiguous(in), v = torch::stable::contiguous(values);
  std::optional<Tensor> b;
  if (bias != nullptr) b = torch::stable::contiguous(*bias);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = O;
  Tensor y = torch::stable::new_empty(x, shape);
  for_type(x.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    product<Sum<In>, In>(static_cast<const In*>(x.const_data_ptr()), static_cast<const In*>(v.const_data_ptr()),
                         b ? static_cast<const In*>(b->const_data_ptr()) : nullptr, static_cast<In*>(y.mutable_data_ptr()), active,
                         x.numel() / I, I, O, scatter);
  });
  return y;
}

Tensor linear(const Tensor& x, const Tensor& values, const Tensor& offsets, int64_t out_features, int64_t band, std::optional<Tensor> bias) {
  return apply(x, values, offsets, out_features, band, bias ? &*bias : nullptr, out_features >= last_size(x));
}

// W^T has the same values and offsets with the roles of the sides exchanged.
Tensor linear_transposed(const Tensor& dy, const Tensor& values, const Tensor& offsets, int64_t in_features, int64_t band) {
  return apply(dy, values, offsets, in_features, band, nullptr, last_size(dy) < in_features);
}

Tensor dvalues(const Tensor& dy, const Tensor& x, const Tensor& offsets, int64_t band) {
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dst_ops: dy and x must have one dtype");
  const int64_t M = last_size(dy), N = last_size(x), P = std::max(M, N), L = std::min(M, N);
  STD_TORCH_CHECK(dy.numel() / M == x.numel() / N, "dst_ops: dy and x must have as many rows");
  const std::vector<Diagonal> active = diagonals(offsets, band, P);
  const Tensor d = torch::stable::contiguous(dy), c = torch::stable::contiguous(x);
  const ScalarType sum_type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor grad = torch::stable::new_empty(c, {static_cast<int64_t>(active.size()), L}, sum_type);
  for_type(c.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    const In *pd = static_cast<const In*>(d.const_data_ptr()), *px = static_cast<const In*>(c.const_data_ptr());
    gradient<Sum<In>, In>(M >= N ? px : pd, M >= N ? pd : px, static_cast<Sum<In>*>(grad.mutable_data_ptr()), active, c.numel() / N, P, L);
  });
  return grad;
}

}  // namespace
}  // namespace dst_ops

// What backend_report() names.
extern "C" __attribute__((visibility("default"))) const char* dst_ops_isa() {
  const dst_ops::Isa chosen = dst_ops::isa();
  return chosen == dst_ops::Isa::avx512 ? "avx512" : chosen == dst_ops::Isa::avx2 ? "avx2" : "portable";
}

STABLE_TORCH_LIBRARY_IMPL(dst_ops, CPU, m) {
  m.impl("linear", TORCH_BOX(&dst_ops::linear));
  m.impl("linear_transposed", TORCH_BOX(&dst_ops::linear_transposed));
  m.impl("dvalues", TORCH_BOX(&dst_ops::dvalues));
}
