// CPU kernels of dst_ops.{linear, linear_transposed, dvalues, diagonal_sums} on the LibTorch stable ABI.
//
// Validation, and the choice of the form of the product: see product.h and gradient.h. Sums have one order, whatever the
// number of threads, so that results are the same bit for bit.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "few.h"
#include "gradient.h"
#include "product.h"
#include "sums.h"

namespace dst_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Units active_units(const Tensor& offsets, int64_t band, int64_t candidates) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.scalar_type() == ScalarType::Int, "dst_ops: offsets must be int32 of one dimension");
  STD_TORCH_CHECK(candidates >= 1 && candidates <= int64_t(1) << 23, "dst_ops: max(in_features, out_features) is ", candidates, ", expected 1 to 2^23");
  STD_TORCH_CHECK(band >= 1 && candidates % band == 0, "dst_ops: band ", band, " must divide ", candidates);
  const Tensor whole = torch::stable::contiguous(offsets);
  const int32_t* units = static_cast<const int32_t*>(whole.const_data_ptr());
  const int64_t count = whole.numel();
  std::vector<char> seen(candidates / band, 0);
  Units result{{}, band};
  result.list.reserve(count);
  for (int64_t u = 0; u < count; ++u) {
    STD_TORCH_CHECK(units[u] >= 0 && units[u] < candidates / band, "dst_ops: offsets[", u, "] is ", units[u], ", expected 0 to ", candidates / band - 1);
    STD_TORCH_CHECK(!seen[units[u]], "dst_ops: offsets repeats unit ", units[u]);
    seen[units[u]] = 1;
    result.list.push_back({units[u] * band, u * band});
  }
  std::sort(result.list.begin(), result.list.end(), [](const Unit& a, const Unit& b) { return a.offset < b.offset; });
  return result;
}

// Calls f with a value of the storage type of `dtype`.
template <typename F>
void for_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) f(float{});
  else if (dtype == ScalarType::BFloat16) f(Bf16{});
  else if (dtype == ScalarType::Half) f(Fp16{});
  else if (dtype == ScalarType::Double) f(double{});
  else STD_TORCH_CHECK(false, "dst_ops: dtype must be float32, bfloat16, float16 or float64");
}

int64_t last_size(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 1 && t.size(t.dim() - 1) >= 1, "dst_ops: x and dy must be [..., features] with at least one feature");
  return t.size(t.dim() - 1);
}

Tensor apply(const Tensor& in, const Tensor& values, const Tensor& offsets, int64_t O, int64_t band, const Tensor* bias, bool scatter) {
  const int64_t I = last_size(in), L = std::min(I, O);
  STD_TORCH_CHECK(O >= 1 && values.dim() == 2, "dst_ops: out_features must be at least 1 and values [K, L]");
  const Units units = active_units(offsets, band, std::max(I, O));
  const int64_t K = static_cast<int64_t>(units.list.size()) * band;
  STD_TORCH_CHECK(values.size(0) == K && values.size(1) == L, "dst_ops: values is [", values.size(0), ", ",
                  values.size(1), "], expected [", K, ", ", L, "]");
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
    const auto of = x.numel() / I <= few_tokens ? few_product<In> : product<In>;
    of(static_cast<const In*>(x.const_data_ptr()), static_cast<const In*>(v.const_data_ptr()),
                         b ? static_cast<const In*>(b->const_data_ptr()) : nullptr, static_cast<In*>(y.mutable_data_ptr()), units,
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
  const Units units = active_units(offsets, band, P);
  const Tensor d = torch::stable::contiguous(dy), c = torch::stable::contiguous(x);
  const ScalarType sum_type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor grad = torch::stable::new_empty(c, {static_cast<int64_t>(units.list.size()) * band, L}, sum_type);
  for_type(c.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    const In *pd = static_cast<const In*>(d.const_data_ptr()), *px = static_cast<const In*>(c.const_data_ptr());
    gradient(M >= N ? px : pd, M >= N ? pd : px, static_cast<typename SumOf<In>::type*>(grad.mutable_data_ptr()), units, c.numel() / N, P, L);
  });
  return grad;
}

Tensor sums_of_diagonals(const Tensor& block, int64_t first_column, int64_t in_features) {
  STD_TORCH_CHECK(block.dim() == 2 && block.size(0) >= 1 && block.scalar_type() == ScalarType::Float, "dst_ops: block must be float32 [out_features, columns]");
  const int64_t M = block.size(0), columns = block.size(1);
  STD_TORCH_CHECK(first_column >= 0 && first_column + columns <= in_features, "dst_ops: columns ", first_column, " to ", first_column + columns - 1,
                  " are not among ", in_features);
  const Tensor whole = torch::stable::contiguous(block);
  Tensor sums = torch::stable::new_empty(whole, {std::max(M, in_features)});
  diagonal_sums(static_cast<const float*>(whole.const_data_ptr()), static_cast<float*>(sums.mutable_data_ptr()), columns, first_column, M, in_features);
  return sums;
}

}  // namespace
}  // namespace dst_ops

// What backend_report() names.
extern "C" __attribute__((visibility("default"))) const char* dst_ops_isa() {
  const dst_ops::Isa chosen = dst_ops::isa();
  return chosen == dst_ops::Isa::avx512 ? "avx512" : chosen == dst_ops::Isa::avx2 ? "avx2" : "portable";
}

// Whether products of many tokens run code generated for their offsets, which a system can forbid.
extern "C" __attribute__((visibility("default"))) bool dst_ops_generates() {
  return dst_ops::isa() != dst_ops::Isa::portable && dst_ops::may_generate();
}

STABLE_TORCH_LIBRARY_IMPL(dst_ops, CPU, m) {
  m.impl("linear", TORCH_BOX(&dst_ops::linear));
  m.impl("linear_transposed", TORCH_BOX(&dst_ops::linear_transposed));
  m.impl("dvalues", TORCH_BOX(&dst_ops::dvalues));
  m.impl("diagonal_sums", TORCH_BOX(&dst_ops::sums_of_diagonals));
}
