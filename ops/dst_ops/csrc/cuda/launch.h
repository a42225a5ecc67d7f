// What the launchers share: checks, the device and its stream, shared memory, a type for a dtype.
//
// Nothing here reads from the device, so that every op can be captured in a CUDA graph.
#pragma once

#ifndef DST_OPS_EMULATED
#define USE_CUDA 1  // before torch's headers: they declare the stream for it
#endif
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "geometry.h"
#include "numbers.h"

namespace dst_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef DST_OPS_EMULATED
#define DST_OPS_DEVICE CPU
struct Device {
  explicit Device(const Tensor&) {}
  int stream = 0;
  int shared_memory = emulator_shared_memory();
  int major = emulator::state.major;
  int processors = 3;
};
template <typename K>
bool fetches_boxes(K, int, const Device& device) { return device.major >= 9; }
inline TensorMap tensor_map(const void* x, int64_t tokens, int features, int columns, int rows) { return {x, tokens, features, columns, rows}; }
template <typename K>
void allow_shared(K, int, const Device&) {}
template <typename... P, typename... A>
void launch_early(void (*kernel)(P...), dim3 grid, dim3 block, int bytes, const Device& device, const A&... arguments) {
  DST_OPS_LAUNCH(kernel, grid, block, bytes, device.stream, arguments...);
}
inline void check_launch() {}
#else
#define DST_OPS_DEVICE CUDA
// The runtime is linked into this library and remembers an error: one that is told to the caller must not be found again by the next launch.
inline void check(cudaError_t result) {
  if (result != cudaSuccess) cudaGetLastError();
  STD_CUDA_CHECK(result);
}
// Makes the tensor's device current while it lives.
struct Device {
  explicit Device(const Tensor& t) : guard(t.get_device_index()), index(t.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
    int value = 0;
    check(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    shared_memory = value;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index));
  }
  torch::stable::accelerator::DeviceGuard guard;
  int index;
  cudaStream_t stream;
  int shared_memory;
  int major = 0;  // compute capability
  int processors = 0;
};
// Whether a kernel that asks the copy engine for boxes does so here. Machine code for chips without one, or that a driver made of code for such a
// chip, has an empty kernel, which takes fewer threads.
template <typename K>
bool fetches_boxes(K kernel, int threads, const Device&) {
  cudaFuncAttributes found;
  check(cudaFuncGetAttributes(&found, kernel));
  return found.maxThreadsPerBlock >= threads;
}
// How the copy engine finds boxes of columns x rows in x [tokens, features] of 16-bit numbers, and exchanges the pieces of a row, which is
// 64 or 128 bytes long.
inline TensorMap tensor_map(const void* x, int64_t tokens, int features, int columns, int rows) {
  static const auto encode = [] {  // of the driver, which the library is not linked with
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result));
#endif
    STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess, "dst_ops: the driver has no cuTensorMapEncodeTiled; install one for CUDA 12.0 or later");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  TensorMap map;
  const cuuint64_t sizes[] = {cuuint64_t(features), cuuint64_t(tokens)}, strides[] = {cuuint64_t(features) * 2};
  const cuuint32_t box[] = {cuuint32_t(columns), cuuint32_t(rows)}, steps[] = {1, 1};
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "dst_ops: no tensor map for [", tokens, ", ", features, "], CUDA error ", int(result));
  return map;
}
// Whether the code of a kernel waits in await_previous(): what a driver makes of assembly for a chip before the H100 does not, on any
// chip. All kernels are compiled for the same list, so one of them is asked, once a device: 1 no, 2 yes.
template <typename K>
bool awaits(K kernel, const Device& device) {
  static std::atomic<char> known[64];
  std::atomic<char>* const answer = device.index < 64 ? &known[device.index] : nullptr;
  if (answer && *answer) return *answer == 2;
  cudaFuncAttributes found;
  check(cudaFuncGetAttributes(&found, kernel));
  if (answer) *answer = found.ptxVersion >= 90 ? 2 : 1;
  return found.ptxVersion >= 90;
}
// Launches a kernel that calls await_previous() where it needs what the launch before it wrote. Others begin when that has ended.
template <typename... P, typename... A>
void launch_early(void (*kernel)(P...), dim3 grid, dim3 block, int bytes, const Device& device, const A&... arguments) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = bytes, config.stream = device.stream;
  config.attrs = &early, config.numAttrs = device.major >= 9 && awaits(kernel, device) ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...));
}
// More than 48 KiB must be asked for, for each kernel and device: always all that there is, as another thread may be about to launch
// the same kernel with more than this call needs.
template <typename K>
void allow_shared(K kernel, int bytes, const Device& device) {
  if (bytes > 48 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_memory));
}
inline void check_launch() { STD_CUDA_KERNEL_LAUNCH_CHECK(); }
#endif

// Blocks that are aimed at where work can be cut freely: twice the processors of an H100. The same on every device, so that
// sums have one order everywhere.
constexpr int64_t many_blocks = 264;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline bool is_half(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half; }

// Contiguous, and where a row of 16-byte pieces can begin.
inline Tensor packed_rows(const Tensor& t) {
  const Tensor c = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(c.const_data_ptr()) % 16 == 0 ? c : torch::stable::clone(c);
}

template <typename T>
const T* read(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <typename T>
T* write(Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

inline int64_t features(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 1 && t.size(t.dim() - 1) >= 1, "dst_ops: x and dy must be [..., features] with at least one feature");
  return t.size(t.dim() - 1);
}

inline Sizes sizes(int64_t tokens, int64_t in, int64_t out, const Tensor& offsets, int64_t band) {
  const int64_t longer = std::max(in, out);
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.scalar_type() == ScalarType::Int && offsets.is_contiguous(), "dst_ops: offsets must be int32 of one dimension, contiguous");
  STD_TORCH_CHECK(out >= 1 && longer <= int64_t(1) << 23, "dst_ops: max(in_features, out_features) is ", longer, ", expected 1 to 2^23");
  STD_TORCH_CHECK(band >= 1 && longer % band == 0, "dst_ops: band ", band, " must divide ", longer);
  STD_TORCH_CHECK(offsets.numel() >= 1 && offsets.numel() <= longer / band, "dst_ops: offsets names ", offsets.numel(), " units, expected 1 to ", longer / band);
  return {tokens, int(in), int(out), int(longer), int(std::min(in, out)), int(offsets.numel()), int(band)};
}

inline void check_values(const Tensor& values, const Tensor& offsets, const Tensor& x, const Sizes& s) {
  const int64_t diagonals = int64_t(s.units) * s.band;
  STD_TORCH_CHECK(values.dim() == 2 && values.size(0) == diagonals && values.size(1) == s.shorter, "dst_ops: values must be [", diagonals, ", ", s.shorter, "]");
  STD_TORCH_CHECK(values.scalar_type() == x.scalar_type(), "dst_ops: values and x must have one dtype");
  STD_TORCH_CHECK(values.device() == x.device() && offsets.device() == x.device(), "dst_ops: values and offsets must be on the device of x");
}

// The result of a product and what its epilogue adds, applies and keeps.
struct Output {
  Tensor y;
  std::optional<Tensor> bias, before;
  bool gelu;
};

inline Output output(const Tensor& x, int64_t out, const std::optional<Tensor>& bias, bool gelu, const std::optional<Tensor>& before) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out;
  Output result{torch::stable::new_empty(x, shape), {}, before, gelu};
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out && bias->scalar_type() == x.scalar_type() && bias->device() == x.device(),
                    "dst_ops: bias must be [", out, "] in the dtype and on the device of x");
    result.bias = torch::stable::contiguous(*bias);
  }
  if (before)
    STD_TORCH_CHECK(before->is_contiguous() && before->numel() == result.y.numel() && before->scalar_type() == x.scalar_type(), "dst_ops: before must be like y");
  STD_TORCH_CHECK(!before || gelu, "dst_ops: before is what GELU is applied to, and gelu is false");
  return result;
}
template <typename T>
const T* bias_of(const Output& o) { return o.bias ? read<T>(*o.bias) : nullptr; }
template <typename T>
T* before_of(Output& o) { return o.before ? write<T>(*o.before) : nullptr; }

// The two tensors of a gradient, by the side that they are on, as [tokens, features].
struct Sides {
  Tensor shorter, longer;
  Sizes s;
};

inline Sides sides(const Tensor& dy, const Tensor& x, const Tensor& offsets, int64_t band) {
  const int64_t m = features(dy), n = features(x), tokens = x.numel() / n;
  STD_TORCH_CHECK(dy.numel() / m == tokens, "dst_ops: dy and x must have as many rows");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dst_ops: dy and x must have one dtype");
  STD_TORCH_CHECK(dy.device() == x.device() && offsets.device() == x.device(), "dst_ops: dy and offsets must be on the device of x");
  Tensor a = packed_rows(dy), b = packed_rows(x);
  return {m >= n ? b : a, m >= n ? a : b, sizes(tokens, n, m, offsets, band)};
}

// Calls f with a value of the kernel's type for a dtype.
template <typename F>
void for_half(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::BFloat16) f(__nv_bfloat16());
  else if (dtype == ScalarType::Half) f(__half());
  else STD_TORCH_CHECK(false, "dst_ops: dtype must be bfloat16 or float16");
}
template <typename F>
void for_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) f(float());
  else for_half(dtype, f);
}

}  // namespace dst_ops
