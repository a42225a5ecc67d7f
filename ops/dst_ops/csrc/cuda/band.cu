// Launches the kernels of band_product.h and band_gradient.h.
#include "band_boxes.h"
#include "band_boxes_gradient.h"
#include "band_gradient.h"
#include "band_product.h"
#include "parts.h"

namespace dst_ops {
namespace {

// Calls f with the widest sub-band that fits a band.
template <typename F>
void for_width(int64_t band, const F& f) {
  if (band % 64 == 0) f(std::integral_constant<int, 64>());
  else if (band % 32 == 0) f(std::integral_constant<int, 32>());
  else if (band % 16 == 0) f(std::integral_constant<int, 16>());
  else f(std::integral_constant<int, 8>());
}

void check_band(const Tensor& x, const Sizes& s) {
  STD_TORCH_CHECK(is_half(x), "dst_ops: the band kernels take bfloat16 or float16");
  STD_TORCH_CHECK(s.band % 8 == 0 && s.shorter % 8 == 0, "dst_ops: the band kernels take bands and feature counts that are multiples of 8");
}

void check_shared(int bytes, const Device& device) {
  STD_TORCH_CHECK(bytes <= device.shared_memory, "dst_ops: the band kernel takes ", bytes, " bytes of shared memory, the device has ", device.shared_memory);
}

void check_tokens(const Sizes& s) { STD_TORCH_CHECK(s.tokens < int64_t(1) << 31, "dst_ops: ", s.tokens, " tokens are too many for a call"); }

// Tokens of a block where they lie in shared memory with all their features: 16 * m * token_warps; 0: stream them.
struct Tile {
  int m, token_warps;
  int bytes(int in) const { return 16 * m * token_warps * band_pitch(in / 8 + 1) * 2 + resident_warps * store_bytes; }
};

// With few tokens, as many blocks as there are rows for. 64 tokens as long as their tiles leave processors free and two blocks fit one:
// blocks that stream are larger, and with many tokens quicker, as they share out the weights among more of them.
Tile tile_of(const Sizes& s, const Device& device) {
  const Tile many{2, 2}, some{2, 1}, few{1, 1};
  if (s.tokens <= 16 && few.bytes(s.in) <= device.shared_memory) return few;
  if (s.tokens <= 32 && some.bytes(s.in) <= device.shared_memory) return some;
  if (s.tokens <= 64 * many_blocks / 2 && many.bytes(s.in) <= device.shared_memory / 2 - 1024) return many;
  return {0, 0};
}

template <typename T, int W, int M, bool Scatter>
void launch_resident(const Tensor& x, const Packed& packed, Output& o, const BandSizes& s, const Tile& tile, const Device& device) {
  const auto kernel = band_resident<T, W, M, Scatter>;
  const int bytes = tile.bytes(s.in);
  allow_shared(kernel, bytes, device);
  const int64_t tiles = ceil_div(s.tokens, 16 * M * tile.token_warps), row_blocks = ceil_div(s.out, band_rows * (resident_warps / tile.token_warps));
  const int64_t wanted = std::max<int64_t>(1, many_blocks / tiles);
  launch_early(kernel, dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(std::min(row_blocks, wanted))), dim3(resident_warps * 32), bytes, device, read<T>(x), packed, bias_of<T>(o),
               write<T>(o.y), before_of<T>(o), s, band_pitch(s.present_blocks + 1), tile.token_warps, o.gelu);
  check_launch();
}

template <typename T, int W, bool Scatter>
void launch_stream(const Tensor& x, const Packed& packed, Output& o, const BandSizes& s, const Device& device) {
  const auto kernel = band_stream<T, W, Scatter>;
  constexpr int bytes = StreamLayout<W>::bytes;
  check_shared(bytes, device);
  allow_shared(kernel, bytes, device);
  const int64_t row_blocks = ceil_div(s.out, band_rows * stream_tiles), tiles = ceil_div(s.tokens, stream_tokens);
  const int64_t in_y = std::min<int64_t>(tiles, most_blocks_in_y), in_z = ceil_div(tiles, most_blocks_in_y);
  STD_TORCH_CHECK(in_z <= 65535, "dst_ops: ", s.tokens, " tokens are too many for a call");
  launch_early(kernel, dim3(static_cast<unsigned>(row_blocks), static_cast<unsigned>(in_y), static_cast<unsigned>(in_z)), dim3(stream_warps * 32), bytes, device, read<T>(x), packed,
               bias_of<T>(o), write<T>(o.y), before_of<T>(o), s, o.gelu);
  check_launch();
}

template <typename T, int W, bool Scatter>
void launch_boxes(const Tensor& x, const Packed& packed, Output& o, const BandSizes& s, const Device& device) {
  using Layout = BoxLayout<W>;
  const auto kernel = band_boxes<T, W, Scatter>;
  check_shared(Layout::bytes, device);
  allow_shared(kernel, Layout::bytes, device);
  const int64_t row_tiles = ceil_div(s.tiles, Layout::tiles), tiles = row_tiles * ceil_div(s.tokens, Layout::tokens);
  check_tokens(s);
  launch_early(kernel, dim3(static_cast<unsigned>(std::min<int64_t>(tiles, device.processors))), dim3(Layout::threads), Layout::bytes, device,
               tensor_map(x.const_data_ptr(), s.tokens, s.in, W, Layout::tokens), packed, bias_of<T>(o), write<T>(o.y), before_of<T>(o), s, o.gelu, static_cast<int>(row_tiles), tiles);
  check_launch();
}

template <typename T, int W, bool Scatter>
void product(const Tensor& x, const Tensor& values, const Tensor& offsets, Output& o, const Sizes& plain, const Device& device) {
  const BandSizes s = band_sizes<W>(plain);
  const int64_t words = int64_t(s.sub_bands) * s.tiles * band_quads<W> * 32 * 4;
  Tensor memory = torch::stable::new_empty(x, {words + s.sub_bands}, ScalarType::Int);
  const Packed packed{static_cast<uint32_t*>(memory.mutable_data_ptr()), static_cast<int*>(memory.mutable_data_ptr()) + words};
  DST_OPS_LAUNCH((band_pack<T, W, Scatter>), dim3(s.tiles, std::min(s.sub_bands, 65535)), dim3(256), 0, device.stream, read<T>(values), read<int>(offsets), packed, s);
  check_launch();
  const Tile tile = tile_of(s, device);
  if constexpr (W >= 32)
    if (tile.m == 0 && fetches_boxes(band_boxes<T, W, Scatter>, BoxLayout<W>::threads, device)) return launch_boxes<T, W, Scatter>(x, packed, o, s, device);
  if (tile.m == 0) launch_stream<T, W, Scatter>(x, packed, o, s, device);
  else (tile.m == 2 ? launch_resident<T, W, 2, Scatter> : launch_resident<T, W, 1, Scatter>)(x, packed, o, s, tile, device);
}

Tensor linear(const Tensor& x, const Tensor& values, const Tensor& offsets, int64_t out_features, int64_t band, bool scatter, std::optional<Tensor> bias, bool gelu,
              std::optional<Tensor> before) {
  const int64_t in = features(x);
  const Sizes s = sizes(x.numel() / in, in, out_features, offsets, band);
  check_values(values, offsets, x, s);
  check_band(x, s);
  const Device device(x);
  const Tensor xs = packed_rows(x), vs = torch::stable::contiguous(values);
  Output o = output(xs, out_features, bias, gelu, before);
  if (s.tokens == 0) return o.y;
  for_half(x.scalar_type(), [&](auto zero) {
    for_width(band, [&](auto width) {
      constexpr int W = decltype(width)::value;
      (scatter ? product<decltype(zero), W, true> : product<decltype(zero), W, false>)(xs, vs, offsets, o, s, device);
    });
  });
  return o.y;
}

Tensor dvalues(const Tensor& dy, const Tensor& x, const Tensor& offsets, int64_t band) {
  const Sides t = sides(dy, x, offsets, band);
  check_band(x, t.s);
  const Device device(x);
  if (t.s.tokens == 0) return torch::stable::new_zeros(t.longer, {int64_t(t.s.units) * t.s.band, t.s.shorter}, ScalarType::Float);
  std::optional<Tensor> sums;
  for_half(x.scalar_type(), [&](auto zero) {
    for_width(band, [&](auto width) {
      using T = decltype(zero);
      constexpr int W = decltype(width)::value;
      const int64_t sub_bands = int64_t(t.s.units) * (t.s.band / W);
      const auto parts_of = [&](int64_t blocks, int64_t slots) {
        return torch::stable::new_empty(t.longer, {splits_of(t.s.tokens, blocks, 256, slots), int64_t(t.s.units) * t.s.band, t.s.shorter}, ScalarType::Float);
      };
      if constexpr (W >= 32) {
        using Layout = BoxGradientLayout<W>;
        const auto kernel = band_boxes_gradient<T, W>;
        if (fetches_boxes(kernel, Layout::threads, device)) {
          const int64_t bands = ceil_div(sub_bands, Layout::bands), columns = ceil_div(t.s.shorter, Layout::columns);
          Tensor parts = parts_of(bands * columns, many_blocks / 2);
          check_shared(Layout::bytes, device);
          check_tokens(t.s);
          allow_shared(kernel, Layout::bytes, device);
          DST_OPS_LAUNCH(kernel, dim3(static_cast<unsigned>(columns), static_cast<unsigned>(bands), static_cast<unsigned>(parts.size(0))), dim3(Layout::threads), Layout::bytes,
                         device.stream, tensor_map(t.shorter.const_data_ptr(), t.s.tokens, t.s.shorter, Layout::box_columns, Layout::tokens),
                         tensor_map(t.longer.const_data_ptr(), t.s.tokens, t.s.longer, W, Layout::tokens), read<int>(offsets), write<float>(parts), t.s, static_cast<int>(sub_bands / bands),
                         static_cast<int>(sub_bands % bands));
          check_launch();
          sums = sum_parts(parts, device);
          return;
        }
      }
      const int64_t bands = ceil_div(sub_bands, gradient_bands<W>), columns = ceil_div(t.s.shorter, gradient_columns);
      Tensor parts = parts_of(bands * columns, many_blocks);
      const auto kernel = band_gradient<T, W>;
      constexpr int bytes = GradientLayout<W>::bytes;
      check_shared(bytes, device);
      allow_shared(kernel, bytes, device);
      DST_OPS_LAUNCH(kernel, dim3(static_cast<unsigned>(columns), static_cast<unsigned>(bands), static_cast<unsigned>(parts.size(0))), dim3(gradient_warps * 32), bytes, device.stream,
                     read<T>(t.shorter), read<T>(t.longer), read<int>(offsets), write<float>(parts), t.s);
      check_launch();
      sums = sum_parts(parts, device);
    });
  });
  return *sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dst_ops, DST_OPS_DEVICE, m) {
  m.impl("cuda_band", TORCH_BOX(&linear));
  m.impl("cuda_band_dvalues", TORCH_BOX(&dvalues));
}

}  // namespace dst_ops
