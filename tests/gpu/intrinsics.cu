// What each instruction of platform.h does to a warp's registers, to compare the emulator with hardware.
#include "launch.h"

namespace dst_ops {
namespace {

constexpr int results = 21;  // words a lane

// a [16, 16], b [16, 8] of T. out [32, results]: see tests/gpu/test_intrinsics.py for which word is what.
template <typename T>
__global__ void run_intrinsics(const T* a, const T* b, uint32_t* out) {
  DST_OPS_SHARED(memory);
  T* as = reinterpret_cast<T*>(memory);
  T* bs = as + 16 * 16;
  const int lane = threadIdx.x;
  copy_async<true>(shared_address(as + lane * 8), a + lane * 8, true);
  copies_commit();
  copy_async<false>(shared_address(bs + lane * 8), b + (lane < 16 ? lane * 8 : 0), lane < 16);  // zeros behind b
  copies_commit();
  copies_wait<1>();
  copies_wait<0>();
  __syncwarp();
  uint32_t fa[4], fb[4], quad[4] = {};
  load_matrices(fa, shared_address(as + lane % 16 * 16 + lane / 16 * 8));
  load_matrices_transposed(fb, shared_address(bs + lane * 8));
  float k16[4] = {}, k8[4] = {};
  mma_k16(T(), k16, fa, fb[0], fb[1]);
  mma_k8(T(), k8, fa[2], fa[3], fb[1]);
  union { float f; uint32_t u; } word;
  for (int i = 0; i < 4; ++i) {
    quad[i] = __shfl_xor_sync(~0u, fa[i], i);
    out[lane * results + i] = fa[i];
    out[lane * results + 4 + i] = fb[i];
    word.f = k16[i], out[lane * results + 8 + i] = word.u;
    word.f = k8[i], out[lane * results + 12 + i] = word.u;
  }
  out[lane * results + 16] = quad[1] ^ quad[2];
  out[lane * results + 17] = __ballot_sync(~0u, lane % 3 == 0);
  const uint4 q = load_shared(as + lane * 8);
  out[lane * results + 18] = q.x ^ q.w;
  out[lane * results + 20] = __shfl_sync(~0u, fa[0], lane / 2) + __ffs(lane << 3) + thread_again();
  out[lane * results + 19] = pair(wide(as[lane]), wide(as[lane + 1]), T());
}

constexpr int box_rows = 16;

// x [tokens, features]. A box of it from column, token on, and what lies at its beginning, as they come into shared memory: out [box and 64
// bytes], words.
__global__ void run_engine(const __grid_constant__ TensorMap map, const uint32_t* x, uint32_t* out, int bytes, int column, int token) {
#if DST_OPS_BOXES
  DST_OPS_SHARED(raw);
  const SharedAddress memory = (shared_address(raw) + 1023) / 1024 * 1024, barrier = memory + bytes + 64;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(raw + (memory - shared_address(raw)));
  if (threadIdx.x == 0) barrier_init(barrier, 2), barriers_ready();
  __syncthreads();
  if (threadIdx.x == 0) barrier_wait(barrier, 1);  // does not wait
  for (int turn = 0; turn < 2; ++turn) {  // the second time in the other parity
    if (threadIdx.x == 0) {
      barrier_expect(barrier, bytes + 64);
      copy_box(memory, map, column, token, barrier);
      copy_bulk(memory + bytes, x, 64, barrier);
    }
    if (threadIdx.x == 1) barrier_arrive(barrier);
    barrier_wait(barrier, turn);
    for (int i = threadIdx.x; i < bytes / 4 + 16; i += 32) out[i] = words[i] + turn;
    __syncthreads();
  }
#endif
}

Tensor engine(const Tensor& x, int64_t columns, int64_t column, int64_t token) {
  const Device device(x);
  const int bytes = box_rows * int(columns) * 2;
  Tensor out = torch::stable::new_empty(x, {bytes / 4 + 16}, ScalarType::Int);
  DST_OPS_LAUNCH(run_engine, dim3(1), dim3(32), 1024 + bytes + 64 + 8, device.stream, tensor_map(x.const_data_ptr(), x.size(0), int(x.size(1)), int(columns), box_rows),
                 static_cast<const uint32_t*>(x.const_data_ptr()), static_cast<uint32_t*>(out.mutable_data_ptr()), bytes, int(column), int(token));
  check_launch();
  return out;
}

Tensor intrinsics(const Tensor& a, const Tensor& b) {
  const Device device(a);
  Tensor out = torch::stable::new_empty(a, {32, results}, ScalarType::Int);
  for_half(a.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    DST_OPS_LAUNCH(run_intrinsics<T>, dim3(1), dim3(32), (16 * 16 + 32 * 8) * 2, device.stream, read<T>(a), read<T>(b), reinterpret_cast<uint32_t*>(out.mutable_data_ptr()));
    check_launch();
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dst_ops, DST_OPS_DEVICE, m) {
  m.impl("test_intrinsics", TORCH_BOX(&intrinsics));
  m.impl("test_engine", TORCH_BOX(&engine));
}

}  // namespace dst_ops
