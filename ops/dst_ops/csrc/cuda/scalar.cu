// Launches the kernels of scalar.h and scalar_few.h.
#include "scalar.h"

#include "parts.h"
#include "scalar_few.h"

namespace dst_ops {
namespace {

constexpr int64_t few_tokens = 32, few_blocks = 120;  // blocks: hardly fewer than an H100's processors

template <typename T, int Groups>
void launch_product(const Tensor& x, const Tensor& values, const Tensor& offsets, Output& o, const Sizes& s, bool scatter, const Device& device) {
  const auto kernel = scatter ? scalar_product<T, Groups, true> : scalar_product<T, Groups, false>;
  const int bytes = ScalarLayout(s.in, Groups).bytes();
  allow_shared(kernel, bytes, device);
  const int64_t tiles = ceil_div(s.tokens, Groups * pack_size<T>);
  // A block goes over all rows, so that x is staged once, but where that would leave few blocks.
  const int64_t row_blocks = ceil_div(s.out, 256), wanted = std::max<int64_t>(1, many_blocks / tiles);
  DST_OPS_LAUNCH(kernel, dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(std::min({row_blocks, wanted, int64_t(65535)}))), dim3(256), bytes, device.stream, read<T>(x),
                 read<T>(values), read<int>(offsets), bias_of<T>(o), write<T>(o.y), before_of<T>(o), s, o.gelu);
  check_launch();
}

template <typename T, int Tokens>
bool few_fits(const Sizes& s, bool scatter, const Device& device) {
  return (scatter ? FewLayout<T, Tokens, true>(s.in).bytes() : FewLayout<T, Tokens, false>(s.in).bytes()) <= device.shared_memory;
}

template <typename T, int Tokens, bool Scatter>
void launch_few_as(const Tensor& x, const Tensor& values, const Tensor& offsets, Output& o, const Sizes& s, const Device& device) {
  const auto kernel = scalar_few<T, Tokens, Scatter>;
  const int bytes = FewLayout<T, Tokens, Scatter>(s.in).bytes();
  allow_shared(kernel, bytes, device);
  // Each block stages its tokens: the more of them, the fewer blocks along the rows, as long as nearly every processor has one.
  const int64_t tiles = ceil_div(s.tokens, Tokens);
  int group_bits = 0;
  while (group_bits < 2 && ceil_div(s.out, 64 << group_bits) * tiles >= few_blocks) ++group_bits;
  const dim3 grid(static_cast<unsigned>(ceil_div(s.out, 32 << group_bits)), static_cast<unsigned>(tiles));
  launch_early(kernel, grid, dim3(32, few_warps), bytes, device, read<T>(x), read<T>(values), read<int>(offsets), bias_of<T>(o), write<T>(o.y), before_of<T>(o), s, group_bits, o.gelu);
  check_launch();
}

template <typename T, int Tokens>
void launch_few(const Tensor& x, const Tensor& values, const Tensor& offsets, Output& o, const Sizes& s, bool scatter, const Device& device) {
  (scatter ? launch_few_as<T, Tokens, true> : launch_few_as<T, Tokens, false>)(x, values, offsets, o, s, device);
}

// The most packs of tokens of which two blocks fit a processor, and that leave enough blocks; 0 if not even one pack fits.
template <typename T>
int packs_of_a_tile(const Sizes& s, const Device& device) {
  if (ScalarLayout(s.in, 1).bytes() > device.shared_memory) return 0;
  for (int groups : {32 / pack_size<T>, 16 / pack_size<T>, 8 / pack_size<T>})
    if (ScalarLayout(s.in, groups).bytes() <= device.shared_memory / 2 - 1024 && s.tokens >= groups * pack_size<T> * many_blocks / 2) return groups;
  return 1;
}

template <typename T>
void product(const Tensor& x, const Tensor& values, const Tensor& offsets, Output& o, const Sizes& s, bool scatter, const Device& device) {
  // One token takes an eighth of the shared memory that a pack of them does, or less.
  if (s.tokens == 1 && few_fits<T, 1>(s, scatter, device)) return launch_few<T, 1>(x, values, offsets, o, s, scatter, device);
  const int groups = packs_of_a_tile<T>(s, device);
  STD_TORCH_CHECK(groups > 0, "dst_ops: in_features ", s.in, " do not fit shared memory");
  constexpr int most = 32 / pack_size<T>;
  const auto launch = s.tokens <= few_tokens && few_fits<T, pack_size<T>>(s, scatter, device) ? launch_few<T, pack_size<T>>
                      : groups == most         ? launch_product<T, most>
                      : groups == most / 2     ? launch_product<T, most / 2>
                      : groups == 2            ? launch_product<T, 2>
                                               : launch_product<T, 1>;
  launch(x, values, offsets, o, s, scatter, device);
}

Tensor linear(const Tensor& x, const Tensor& values, const Tensor& offsets, int64_t out_features, int64_t band, bool scatter, std::optional<Tensor> bias, bool gelu,
              std::optional<Tensor> before) {
  const int64_t in = features(x);
  const Sizes s = sizes(x.numel() / in, in, out_features, offsets, band);
  check_values(values, offsets, x, s);
  const Device device(x);
  const Tensor xs = packed_rows(x), vs = packed_rows(values);
  Output o = output(xs, out_features, bias, gelu, before);
  if (s.tokens > 0) for_type(x.scalar_type(), [&](auto zero) { product<decltype(zero)>(xs, vs, offsets, o, s, scatter, device); });
  return o.y;
}

Tensor dvalues(const Tensor& dy, const Tensor& x, const Tensor& offsets, int64_t band) {
  const Sides t = sides(dy, x, offsets, band);
  const Device device(x);
  const int bytes = (t.s.longer + 1) * 16;
  STD_TORCH_CHECK(bytes <= device.shared_memory, "dst_ops: max(in_features, out_features) ", t.s.longer, " do not fit shared memory");
  std::optional<Tensor> sums;
  for_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t diagonals = int64_t(t.s.units) * t.s.band;
    const int64_t columns = ceil_div(t.s.shorter, scalar_gradient_threads), rows = ceil_div(diagonals, scalar_gradient_diagonals<T>);
    const int splits = splits_of(t.s.tokens, columns * rows, 128);
    Tensor parts = torch::stable::new_empty(t.longer, {splits, diagonals, t.s.shorter}, ScalarType::Float);
    allow_shared(scalar_gradient<T>, bytes, device);
    DST_OPS_LAUNCH(scalar_gradient<T>, dim3(static_cast<unsigned>(columns), static_cast<unsigned>(rows), splits), dim3(scalar_gradient_threads), bytes, device.stream,
                   read<T>(t.shorter), read<T>(t.longer), read<int>(offsets), write<float>(parts), t.s);
    check_launch();
    sums = sum_parts(parts, device);
  });
  return *sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dst_ops, DST_OPS_DEVICE, m) {
  m.impl("cuda_scalar", TORCH_BOX(&linear));
  m.impl("cuda_scalar_dvalues", TORCH_BOX(&dvalues));
}

}  // namespace dst_ops
