// What is not plain C++. Tests compile the same kernels and launchers for the host: everything that differs is here and in
// tests/gpu/emulator/cuda_emulator.h, which provides the same names.
#pragma once

#include <stdint.h>

#ifdef DST_OPS_EMULATED
#include "cuda_emulator.h"
#else
#include <assert.h>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DST_OPS_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define DST_OPS_LAUNCH(kernel, grid, block, bytes, stream, ...) kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__)
// Stops the grid: reading the number on the host instead would wait for the device at every call.
#define DST_OPS_ASSERT(condition, message) assert((condition) && message)

namespace dst_ops {

__device__ __forceinline__ uint4 load_shared(const void* p) { return *static_cast<const uint4*>(p); }

// D[16 x 8] += A[16 x 16] B[16 x 8], sums in fp32; fragments as in the PTX manual, "mma.m16n8k16 with floating point".
#define DST_OPS_MMA(type, name)                                                                                                  \
  __device__ __forceinline__ void mma_k16(type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {                \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"          \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                         \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                                         \
  }                                                                                                                              \
  __device__ __forceinline__ void mma_k8(type, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {                            \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." name "." name ".f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"                    \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                         \
        : "r"(a0), "r"(a1), "r"(b));                                                                                             \
  }
DST_OPS_MMA(__nv_bfloat16, "bf16")
DST_OPS_MMA(__half, "f16")
#undef DST_OPS_MMA

// A kernel that launch_early launches may begin while the one before it on the stream still runs. It reads nothing that
// one writes before await_previous(); the one before says with let_next_begin() from when on the processors are shared.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// threadIdx.x, asked for again: what is computed from it is computed where it is needed, and takes no registers over a loop.
__device__ __forceinline__ unsigned thread_again() {
  unsigned x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// A value, of which the compiler cannot know that it is the same as before: likewise.
__device__ __forceinline__ unsigned again(unsigned v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Bytes in shared memory: half the registers of a pointer.
typedef uint32_t SharedAddress;
__device__ __forceinline__ SharedAddress shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ uint4 load_shared(SharedAddress p) {
  uint4 q;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w) : "r"(p));
  return q;
}

__device__ __forceinline__ void store_shared(SharedAddress p, uint32_t v) { asm volatile("st.shared.u32 [%0],%1;" ::"r"(p), "r"(v) : "memory"); }
// At once: nvcc splits what is assigned to a uint4 in four where its parts come from shared memory.
__device__ __forceinline__ void store_global(void* p, const uint4& q) { asm volatile("st.global.v4.u32 [%0],{%1,%2,%3,%4};" ::"l"(p), "r"(q.x), "r"(q.y), "r"(q.z), "r"(q.w) : "memory"); }

// 8 x 8 matrices of 16-bit elements: lane i gives the address of row i % 8 of matrix i / 8 (16 bytes, aligned).
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], SharedAddress p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p));
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], SharedAddress p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p));
}

// Copies 16 bytes to shared memory in the background, or writes zeros and reads nothing. Lines: lanes that copy a line of 128 bytes copy
// it to one. Otherwise copies must go through the first-level cache: past it an H100 fetches half as much again.
template <bool Lines>
__device__ __forceinline__ void copy_async(SharedAddress to, const void* global, bool present) {
  const int bytes = present ? 16 : 0;
  if (Lines) asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(global), "r"(bytes));
  else asm volatile("cp.async.ca.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(global), "r"(bytes));
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;"); }
// Until at most `Left` of this thread's groups are on their way.
template <int Left>
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(Left)); }

// The copy engine of the H100, and the barriers that count the bytes it has copied. A phase of a barrier is over when all threads that it was
// initialised for have arrived and all bytes that they expect have come; barrier_wait waits for the end of a phase of this parity, the first
// being 0, and does not wait for one before the first.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define DST_OPS_BOXES 1
#else
#define DST_OPS_BOXES 0
#endif
typedef CUtensorMap TensorMap;
#if DST_OPS_BOXES
__device__ __forceinline__ void barrier_init(SharedAddress b, int threads) { asm volatile("mbarrier.init.shared.b64 [%0],%1;" ::"r"(b), "r"(threads) : "memory"); }
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(SharedAddress b) { asm volatile("mbarrier.arrive.shared.b64 _,[%0];" ::"r"(b) : "memory"); }
__device__ __forceinline__ void barrier_expect(SharedAddress b, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;" ::"r"(b), "r"(bytes) : "memory"); }
__device__ __forceinline__ void barrier_wait(SharedAddress b, unsigned parity) {
  asm volatile("{\n.reg .pred over;\nagain%=:\nmbarrier.try_wait.parity.shared.b64 over,[%0],%1;\n@!over bra again%=;\n}" ::"r"(b), "r"(parity) : "memory");
}
// By all warps of each four: fewer registers a thread, or more of those that others gave.
template <int Registers>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers)); }
template <int Registers>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers)); }
// A box of a tensor [tokens, features], zeros outside it; 16-byte pieces of its rows are exchanged as its map says, by where they lie in memory.
__device__ __forceinline__ void copy_box(SharedAddress to, const TensorMap& map, int column, int token, SharedAddress b) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0],[%1,{%2,%3}],[%4];" ::"r"(to), "l"(&map), "r"(column), "r"(token), "r"(b)
               : "memory");
}
// A multiple of 16 bytes.
__device__ __forceinline__ void copy_bulk(SharedAddress to, const void* global, int bytes, SharedAddress b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(to), "l"(global), "r"(bytes), "r"(b) : "memory");
}
#endif

}  // namespace dst_ops
#endif
