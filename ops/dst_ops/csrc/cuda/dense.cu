// Launches the kernels of dense.h.
#include "dense.h"

#include "launch.h"

namespace dst_ops {
namespace {

constexpr unsigned most_rows = 4096;  // blocks along the second dimension of a grid

Tensor weight(const Tensor& values, const Tensor& offsets, int64_t out_features, int64_t in_features, int64_t band) {
  const Sizes s = sizes(0, in_features, out_features, offsets, band);
  check_values(values, offsets, values, s);
  const Device device(values);
  const Tensor vs = torch::stable::contiguous(values);
  Tensor slots = torch::stable::new_empty(offsets, {s.longer}), dense = torch::stable::new_empty(vs, {s.out, s.in});
  DST_OPS_LAUNCH(invert_offsets, dim3(1), dim3(1024), 0, device.stream, read<int>(offsets), write<int>(slots), s);
  check_launch();
  for_type(values.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    DST_OPS_LAUNCH(dense_weight<T>, dim3(static_cast<unsigned>(ceil_div(s.in, 256 * pack_size<T>)), std::min<unsigned>(s.out, most_rows)), dim3(256), 0, device.stream, read<T>(vs), read<int>(slots),
                   write<T>(dense), s);
    check_launch();
  });
  return dense;
}

Tensor diagonals(const Tensor& matrix, const Tensor& offsets, int64_t band) {
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.scalar_type() == ScalarType::Float, "dst_ops: the matrix must be float32 of two dimensions");
  STD_TORCH_CHECK(offsets.device() == matrix.device(), "dst_ops: offsets must be on the device of the matrix");
  const Sizes s = sizes(0, matrix.size(1), matrix.size(0), offsets, band);
  const Device device(matrix);
  const Tensor whole = torch::stable::contiguous(matrix);
  Tensor values = torch::stable::new_empty(whole, {int64_t(s.units) * s.band, s.shorter});
  DST_OPS_LAUNCH(take_diagonals, dim3(static_cast<unsigned>(ceil_div(s.shorter, 256)), std::min<unsigned>(s.units * s.band, most_rows)), dim3(256), 0, device.stream, read<float>(whole),
                 read<int>(offsets), write<float>(values), s);
  check_launch();
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dst_ops, DST_OPS_DEVICE, m) {
  m.impl("cuda_weight", TORCH_BOX(&weight));
  m.impl("cuda_diagonals", TORCH_BOX(&diagonals));
}

}  // namespace dst_ops
