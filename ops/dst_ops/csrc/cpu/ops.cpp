// CPU kernels of dst_ops.{linear, linear_transposed, dvalues, linear_backward, diagonal_sums} on the LibTorch stable ABI.
//
// Validation, and the choice of the form of the product: see product.h and gradient.h. Sums have one order, whatever the
// number of threads, so that results are the same bit for bit.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "backward.h"
#include "few.h"
#include "gradient.h"
#include "layout.h"
#include "product.h"
#include "sums.h"

namespace dst_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below, functions of the C interface where torch::stable would look up an operator by its name at every call: with what these
// few lines save, a call of one token takes 2 us less of 8.
Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

Units active_units(const Tensor& offsets, int64_t band, int64_t candidates) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.scalar_type() == ScalarType::Int, "dst_ops: offsets must be int32 of one dimension");
  STD_TORCH_CHECK(candidates >= 1 && candidates <= int64_t(1) << 23, "dst_ops: max(in_features, out_features) is ", candidates, ", expected 1 to 2^23");
  STD_TORCH_CHECK(band >= 1 && candidates % band == 0, "dst_ops: band ", band, " must divide ", candidates);
  const Tensor whole = as_contiguous(offsets);
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

Tensor empty(const std::vector<int64_t>& shape, int32_t dtype, bool feature_major = false) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(shape[d], 1);
  if (feature_major) strides[shape.size() - 2] = 1, strides.back() = shape[shape.size() - 2];
  AtenTensorHandle handle = nullptr;
  const auto made = aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle);
  STD_TORCH_CHECK(made == AOTI_TORCH_SUCCESS, "dst_ops: no memory for a result of ", std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<int64_t>()),
                  " numbers; use fewer tokens at a time");
  return Tensor(handle);
}

// A tensor [..., S, features] and how it lies.
struct Tokens {
  Tensor tensor;
  Layout layout;
};

Tokens row_major(const Tensor& t) {
  const int64_t all = t.numel() / t.size(t.dim() - 1);
  return {as_contiguous(t), {all, all, false}};
}

// In the layout that it has, or copied: reference.py's `as_taken`.
Tokens as_taken(const Tensor& t) {
  const int64_t dims = t.dim();
  bool transposed = dims >= 2 && t.size(dims - 2) >= least_run && !t.is_contiguous();
  int64_t step = 1;
  const auto lies = [&](int64_t d) { transposed = transposed && (t.size(d) == 1 || t.stride(d) == step), step *= t.size(d); };
  if (transposed) {
    lies(dims - 2), lies(dims - 1);
    for (int64_t d = dims - 2; d-- > 0;) lies(d);
  }
  return transposed ? Tokens{t, {t.numel() / t.size(dims - 1), t.size(dims - 2), true}} : row_major(t);
}

template <typename In>
Operand<In> operand(const Tokens& t) {
  return {static_cast<const In*>(t.tensor.const_data_ptr()), t.tensor.size(t.tensor.dim() - 1), t.layout};
}

// As `like`, but for the number of features.
Tensor empty_like(const Tokens& like, int64_t features) {
  const auto sizes = like.tensor.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = features;
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.tensor.get(), &dtype));
  return empty(shape, dtype, like.layout.feature_major);
}

// For sums of numbers of x.
Tensor empty_sums(const Tensor& x, const std::vector<int64_t>& shape) {
  return empty(shape, x.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
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

// Of a weight with sides I and O, whose values x multiplies.
Units units_of_weight(const Tensor& x, const Tensor& values, const Tensor& offsets, int64_t band, int64_t I, int64_t O) {
  STD_TORCH_CHECK(O >= 1 && values.dim() == 2, "dst_ops: out_features must be at least 1 and values [K, L]");
  Units units = active_units(offsets, band, std::max(I, O));
  const int64_t K = static_cast<int64_t>(units.list.size()) * band, L = std::min(I, O);
  STD_TORCH_CHECK(values.size(0) == K && values.size(1) == L, "dst_ops: values is [", values.size(0), ", ",
                  values.size(1), "], expected [", K, ", ", L, "]");
  STD_TORCH_CHECK(values.scalar_type() == x.scalar_type(), "dst_ops: values and x must have one dtype");
  return units;
}

Tensor apply(const Tensor& in, const Tensor& values, const Tensor& offsets, int64_t O, int64_t band, const Tensor* bias, bool scatter) {
  const int64_t I = last_size(in);
  const Units units = units_of_weight(in, values, offsets, band, I, O);
  STD_TORCH_CHECK(bias == nullptr || (bias->dim() == 1 && bias->size(0) == O && bias->scalar_type() == in.scalar_type()),
                  "dst_ops: bias must be [", O, "] in the dtype of x");
  const Tokens x = as_taken(in);
  const Tensor v = as_contiguous(values);
  std::optional<Tensor> b;
  if (bias != nullptr) b = as_contiguous(*bias);
  Tensor y = empty_like(x, O);
  for_type(in.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    const In* pv = static_cast<const In*>(v.const_data_ptr());
    const In* pb = b ? static_cast<const In*>(b->const_data_ptr()) : nullptr;
    In* py = static_cast<In*>(y.mutable_data_ptr());
    if (x.layout.tokens <= few_tokens) few_product(operand<In>(x).data, pv, pb, py, units, x.layout.tokens, I, O, scatter);
    else product(operand<In>(x), pv, pb, py, units, O, scatter);
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

void check_rows(const Tensor& dy, const Tensor& x) {
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dst_ops: dy and x must have one dtype");
  const auto a = dy.sizes(), b = x.sizes();
  STD_TORCH_CHECK(last_size(dy) >= 1 && last_size(x) >= 1 && a.size() == b.size() && std::equal(a.begin(), a.end() - 1, b.begin()),
                  "dst_ops: dy and x must be of one shape but for the last dimension");
}

Tensor dvalues(const Tensor& dy, const Tensor& x, const Tensor& offsets, int64_t band) {
  check_rows(dy, x);
  const Tokens d = as_taken(dy), c = as_taken(x);
  const int64_t M = last_size(dy), N = last_size(x);
  const Units units = active_units(offsets, band, std::max(M, N));
  Tensor grad = empty_sums(x, {static_cast<int64_t>(units.list.size()) * band, std::min(M, N)});
  for_type(x.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    const auto [work, finish] = gradient(operand<In>(d), operand<In>(c), static_cast<typename SumOf<In>::type*>(grad.mutable_data_ptr()), units);
    torch::stable::parallel_for(0, work.count, 1, work.run);
    finish();
  });
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& values, const Tensor& offsets, int64_t band) {
  check_rows(dy, x);
  const Tokens d = as_taken(dy), c = as_taken(x);
  const int64_t M = last_size(dy), N = last_size(x);
  const Units units = units_of_weight(x, values, offsets, band, M, N);
  const Tensor v = as_contiguous(values);
  Tensor dx = empty_like(d, N), grad = empty_sums(x, {v.size(0), v.size(1)}), dbias = empty_sums(x, {M});
  for_type(x.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using T = typename SumOf<In>::type;
    backward(operand<In>(d), operand<In>(c), static_cast<const In*>(v.const_data_ptr()), static_cast<In*>(dx.mutable_data_ptr()),
             static_cast<T*>(grad.mutable_data_ptr()), static_cast<T*>(dbias.mutable_data_ptr()), units);
  });
  return {dx, grad, dbias};
}

Tensor sums_of_diagonals(const Tensor& block, int64_t first_column, int64_t in_features) {
  STD_TORCH_CHECK(block.dim() == 2 && block.size(0) >= 1 && block.scalar_type() == ScalarType::Float, "dst_ops: block must be float32 [out_features, columns]");
  const int64_t M = block.size(0), columns = block.size(1);
  STD_TORCH_CHECK(first_column >= 0 && first_column + columns <= in_features, "dst_ops: columns ", first_column, " to ", first_column + columns - 1,
                  " are not among ", in_features);
  const Tensor whole = as_contiguous(block);
  Tensor sums = empty_sums(whole, {std::max(M, in_features)});
  diagonal_sums(static_cast<const float*>(whole.const_data_ptr()), static_cast<float*>(sums.mutable_data_ptr()), columns, first_column, M, in_features);
  return sums;
}

}  // namespace
}  // namespace dst_ops

// What backend_report() names.
extern "C" __attribute__((visibility("default"))) const char* dst_ops_isa() {
  const dst_ops::Isa chosen = dst_ops::isa();
  return chosen == dst_ops::Isa::avx512_48k ? "avx512_48k" : chosen == dst_ops::Isa::avx512 ? "avx512" : chosen == dst_ops::Isa::avx2 ? "avx2" : "portable";
}

// Whether products of many tokens run code generated for their offsets, which a system can forbid.
extern "C" __attribute__((visibility("default"))) bool dst_ops_generates() {
  return dst_ops::isa() != dst_ops::Isa::portable && dst_ops::may_generate();
}

STABLE_TORCH_LIBRARY_IMPL(dst_ops, CPU, m) {
  m.impl("linear", TORCH_BOX(&dst_ops::linear));
  m.impl("linear_transposed", TORCH_BOX(&dst_ops::linear_transposed));
  m.impl("dvalues", TORCH_BOX(&dst_ops::dvalues));
  m.impl("linear_backward", TORCH_BOX(&dst_ops::linear_backward));
  m.impl("diagonal_sums", TORCH_BOX(&dst_ops::sums_of_diagonals));
}
