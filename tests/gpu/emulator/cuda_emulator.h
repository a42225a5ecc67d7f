// Runs CUDA kernels on the host, to test them without a GPU: a fiber for each thread, one block after the other.
//
// Provides the names that ops/dst_ops/csrc/cuda/platform.h takes from CUDA, and nothing of CUDA is needed. Shared memory starts
// as NaNs. Copies in the background are made as late as the program allows, or at once, by the order in which threads run. What
// hardware would do wrong without a word is an error here: threads at different barriers, addresses that are not aligned.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct float2 { float x, y; };
inline uint4 make_uint4(uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return {a, b, c, d}; }
inline float __uint_as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }

struct __nv_bfloat16 { uint16_t bits; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
struct __half { uint16_t bits; };
struct __half2 { __half x, y; };
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {c10::BFloat16(v).x}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)}; }
inline float __half2float(__half v) { return c10::Half(v.bits, c10::Half::from_bits()); }
inline __half __float2half_rn(float v) { return {c10::Half(v).x}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int min(int a, int b) { return a < b ? a : b; }
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int __ffs(unsigned v) { return __builtin_ffs(int(v)); }

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __grid_constant__
#define __launch_bounds__(...)
#define DST_OPS_SHARED(name) unsigned char* name = emulator::shared_memory()
#define DST_OPS_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  do { (void)(stream); emulator::launch(grid, block, bytes, [&] { kernel(__VA_ARGS__); }); } while (false)
#define DST_OPS_ASSERT(condition, message) do { if (!(condition)) emulator::fail(message); } while (false)
#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::state.block)
#define blockDim (emulator::state.block_size)
#define gridDim (emulator::state.grid_size)

extern "C" void dst_ops_emulator_switch(void** save, void* load);

namespace emulator {

struct Copy { void* to; const void* from; bool present; };
struct Landing { uintptr_t barrier; int bytes; std::function<void()> copy; };  // of the copy engine
struct Barrier { uint8_t known, threads, missing, phase; int32_t bytes; };
constexpr uint8_t initialised = 0xb5;
struct Warp {
  int arrived = 0;
  unsigned passed = 0;
  alignas(16) unsigned char deposit[32][32];
};
struct Fiber {
  dim3 thread;
  void* stack_pointer;
  char* stack;
  bool done;
  int lane;
  Warp* warp;
  std::vector<std::vector<Copy>> copies;  // groups, the last of them open
};
enum Counter { shared_loads, shared_waves, mma_k16, mma_k8, counters };
struct State {
  dim3 block, block_size, grid_size;
  std::vector<unsigned char> memory;
  size_t memory_bytes;
  int arrived, threads;
  unsigned passed;
  void* host;
  std::function<void()> body;
  std::string error;
  std::vector<Landing> landings;
  unsigned events;           // of barriers in shared memory: whether threads that only wait wait in vain
  int major = 9;             // compute capability of the chip
  int order = 0;             // in which threads run: 0 forwards, 1 backwards, 2 mixed, and copies at once
  bool count_banks = false;  // slower
  int64_t counts[counters] = {};
};
extern State state;
extern Fiber* current;

void launch(dim3 grid, dim3 block, size_t bytes, std::function<void()> body);
void fail(const char* message);  // ends the launch, which throws
inline unsigned char* shared_memory() { return state.memory.data() + (128 - reinterpret_cast<uintptr_t>(state.memory.data()) % 128) % 128; }
inline void yield() { dst_ops_emulator_switch(&current->stack_pointer, state.host); }

inline void barrier(int& arrived, unsigned& passed, int threads) {
  const unsigned before = passed;
  if (++arrived == threads) arrived = 0, ++passed;
  else while (passed == before) yield();
}

// Every lane deposits something, then reads what it needs of all 32.
template <typename T, typename F>
auto together(const T& mine, const F& of) {
  static_assert(sizeof(T) <= 32);
  Warp* w = current->warp;
  memcpy(w->deposit[current->lane], &mine, sizeof(T));
  barrier(w->arrived, w->passed, 32);
  auto result = of([w](int lane) { T v; memcpy(&v, w->deposit[lane], sizeof(T)); return v; });
  barrier(w->arrived, w->passed, 32);
  return result;
}

inline void check_shared(const void* p, size_t bytes, const char* message) {
  const auto* c = static_cast<const unsigned char*>(p);
  if (c < shared_memory() || c + bytes > shared_memory() + state.memory_bytes || reinterpret_cast<uintptr_t>(p) % bytes) fail(message);
}

// Waves of 8 lanes reading 16 bytes each: as many as pieces that differ and lie in the same 4 of the 32 banks.
template <typename F>
void count_waves(const F& address, int lanes) {
  for (int first = 0; first < lanes; first += 8) {
    size_t most = 0;
    for (uintptr_t bank = 0; bank < 8; ++bank) {
      std::vector<uintptr_t> pieces;
      for (int i = first; i < first + 8; ++i) {
        const uintptr_t piece = address(i) / 16;
        if (piece % 8 == bank && std::find(pieces.begin(), pieces.end(), piece) == pieces.end()) pieces.push_back(piece);
      }
      most = std::max(most, pieces.size());
    }
    state.counts[shared_waves] += most;
    ++state.counts[shared_loads];
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::barrier(emulator::state.arrived, emulator::state.passed, emulator::state.threads); }
inline void __syncwarp() { emulator::barrier(emulator::current->warp->arrived, emulator::current->warp->passed, 32); }
inline unsigned __ballot_sync(unsigned, bool v) {
  return emulator::together(v, [](auto at) { unsigned mask = 0; for (int i = 0; i < 32; ++i) mask |= unsigned(at(i)) << i; return mask; });
}
template <typename T>
T __shfl_sync(unsigned, T v, int lane) { return emulator::together(v, [lane](auto at) { return at(lane); }); }
template <typename T>
T __shfl_xor_sync(unsigned, T v, int mask) { return emulator::together(v, [mask](auto at) { return at(emulator::current->lane ^ mask); }); }

namespace dst_ops {

inline int emulator_shared_memory() { return 227 * 1024; }  // what a block of an H100 may ask for

inline uint4 load_shared(const void* p) {
  emulator::check_shared(p, 16, "load_shared: not 16 aligned bytes of shared memory");
  if (emulator::state.count_banks)
    emulator::together(reinterpret_cast<uintptr_t>(p), [](auto at) { if (emulator::current->lane == 0) emulator::count_waves(at, 32); return 0; });
  return *static_cast<const uint4*>(p);
}

template <typename T>
float element(uint32_t u, int half, T) {
  T v;
  v.bits = half ? u >> 16 : u & 0xffff;
  if constexpr (std::is_same<T, __half>::value) return __half2float(v);
  else return __bfloat162float(v);
}

struct Fragments { uint32_t a[4], b[2]; };

// Steps: halves of k, 8 each. Registers as in the PTX manual: a[0], a[1] rows 0-7 and 8-15 of the first 8 columns.
template <typename T>
void mma(T, float (&d)[4], const Fragments& mine, int steps) {
  emulator::together(mine, [&](auto at) {
    const int row = emulator::current->lane / 4, column = emulator::current->lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      float sum = 0;
      for (int k = 0; k < 8 * steps; ++k)
        sum += element(at(row * 4 + k % 8 / 2).a[i / 2 + k / 8 * 2], k % 2, T()) * element(at((column + i % 2) * 4 + k % 8 / 2).b[k / 8], k % 2, T());
      d[i] += sum;
    }
    if (emulator::current->lane == 0) ++emulator::state.counts[steps == 2 ? emulator::mma_k16 : emulator::mma_k8];
    return 0;
  });
}
template <typename T>
void mma_k16(T, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma(T(), d, {{a[0], a[1], a[2], a[3]}, {b0, b1}}, 2); }
template <typename T>
void mma_k8(T, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) { mma(T(), d, {{a0, a1, 0, 0}, {b, 0}}, 1); }

template <int N>
void matrices(uint32_t (&r)[N], const void* p, bool transposed) {
  emulator::together(p, [&](auto at) {
    const int lane = emulator::current->lane;
    if (lane == 0) {
      for (int i = 0; i < 8 * N; ++i) emulator::check_shared(at(i), 16, "load_matrices: not 16 aligned bytes of shared memory");
      if (emulator::state.count_banks) emulator::count_waves([&](int i) { return reinterpret_cast<uintptr_t>(at(i)); }, 8 * N);
    }
    for (int m = 0; m < N; ++m) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        const int row = transposed ? lane % 4 * 2 + e : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + e;
        pair[e] = static_cast<const uint16_t*>(at(m * 8 + row))[column];
      }
      memcpy(&r[m], pair, 4);
    }
    return 0;
  });
}
typedef uintptr_t SharedAddress;
inline SharedAddress shared_address(const void* p) { return reinterpret_cast<uintptr_t>(p); }
inline uint4 load_shared(SharedAddress p) { return load_shared(reinterpret_cast<const void*>(p)); }
inline void store_shared(SharedAddress p, uint32_t v) {
  emulator::check_shared(reinterpret_cast<const void*>(p), 4, "store_shared: not 4 aligned bytes of shared memory");
  memcpy(reinterpret_cast<void*>(p), &v, 4);
}
inline void store_global(void* p, const uint4& q) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emulator::fail("store_global: an address that is not aligned");
  memcpy(p, &q, 16);
}
inline void load_matrices(uint32_t (&r)[4], SharedAddress p) { matrices(r, reinterpret_cast<const void*>(p), false); }
inline void load_matrices_transposed(uint32_t (&r)[4], SharedAddress p) { matrices(r, reinterpret_cast<const void*>(p), true); }

inline void make_copy(const emulator::Copy& c) {
  if (c.present) memcpy(c.to, c.from, 16);
  else memset(c.to, 0, 16);
}
template <bool Lines>
void copy_async(SharedAddress to, const void* global, bool present) {
  void* shared = reinterpret_cast<void*>(to);
  emulator::check_shared(shared, 16, "copy_async: not 16 aligned bytes of shared memory");
  if (reinterpret_cast<uintptr_t>(global) % 16) emulator::fail("copy_async: a global address that is not aligned");
  const emulator::Copy copy{shared, global, present};
  if (emulator::state.order == 2) make_copy(copy);
  else emulator::current->copies.back().push_back(copy);
}

#define DST_OPS_BOXES 1
struct TensorMap { const void* base; int64_t tokens; int features, columns, rows; };
inline emulator::Barrier& barrier_at(SharedAddress p) {
  auto* b = reinterpret_cast<emulator::Barrier*>(p);
  emulator::check_shared(b, 8, "a barrier that is not 8 aligned bytes of shared memory");
  if (b->known != emulator::initialised) emulator::fail("a barrier that was not initialised");
  return *b;
}
inline void pass(emulator::Barrier& b) {
  ++emulator::state.events;
  if (b.missing == 0 && b.bytes == 0) b.phase ^= 1, b.missing = b.threads;
}
inline void barrier_init(SharedAddress p, int threads) {
  emulator::check_shared(reinterpret_cast<void*>(p), 8, "a barrier that is not 8 aligned bytes of shared memory");
  *reinterpret_cast<emulator::Barrier*>(p) = {emulator::initialised, uint8_t(threads), uint8_t(threads), 0, 0};
}
inline void barriers_ready() {}
inline void barrier_expect(SharedAddress p, int bytes) {
  emulator::Barrier& b = barrier_at(p);
  if (b.missing == 0) emulator::fail("more threads arrive at a barrier than it was initialised for");
  b.bytes += bytes, --b.missing;
  pass(b);
}
inline void barrier_arrive(SharedAddress p) { barrier_expect(p, 0); }
inline void land(const emulator::Landing& l) {
  l.copy();
  emulator::Barrier& b = barrier_at(l.barrier);
  b.bytes -= l.bytes;
  pass(b);
}
// Copies of the engine land when somebody waits for them, or at once.
inline void barrier_wait(SharedAddress p, unsigned parity) {
  while (barrier_at(p).phase == parity) {
    auto& all = emulator::state.landings;
    for (size_t i = 0; i < all.size();) {
      if (all[i].barrier != p) { ++i; continue; }
      const emulator::Landing l = all[i];
      all.erase(all.begin() + i);
      land(l);
    }
    if (barrier_at(p).phase == parity) emulator::yield();
  }
}
inline void take_off(SharedAddress p, int bytes, std::function<void()> copy) {
  const emulator::Landing l{p, bytes, std::move(copy)};
  if (emulator::state.order == 2) land(l);
  else emulator::state.landings.push_back(l);
}
template <int Registers>
void give_registers() {}
template <int Registers>
void take_registers() {}
inline void copy_box(SharedAddress to, const TensorMap& map, int column, int token, SharedAddress b) {
  const int row = map.columns * 2, bytes = map.rows * row;
  if (to % 128 || reinterpret_cast<uintptr_t>(map.base) % 16 || map.features % 8 || (row != 64 && row != 128)) emulator::fail("copy_box: a tensor or a place that CUDA refuses");
  emulator::check_shared(reinterpret_cast<void*>(to), 16, "copy_box: outside shared memory");
  emulator::check_shared(reinterpret_cast<void*>(to + bytes - 16), 16, "copy_box: outside shared memory");
  take_off(b, bytes, [=] {
    for (int r = 0; r < map.rows; ++r)
      for (int c = 0; c < map.columns; ++c) {
        const bool there = token + r >= 0 && token + r < map.tokens && column + c >= 0 && column + c < map.features;
        const uint16_t v = there ? static_cast<const uint16_t*>(map.base)[(token + r) * int64_t(map.features) + column + c] : 0;
        uintptr_t at = to + r * row + c * 2;
        at ^= (at / 128 % (row / 16)) * 16;  // the swizzle, by address
        memcpy(reinterpret_cast<void*>(at), &v, 2);
      }
  });
}
inline void copy_bulk(SharedAddress to, const void* global, int bytes, SharedAddress b) {
  if (to % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16) emulator::fail("copy_bulk: not 16 aligned bytes");
  emulator::check_shared(reinterpret_cast<void*>(to), 16, "copy_bulk: outside shared memory");
  emulator::check_shared(reinterpret_cast<void*>(to + bytes - 16), 16, "copy_bulk: outside shared memory");
  take_off(b, bytes, [=] { memcpy(reinterpret_cast<void*>(to), global, bytes); });
}
inline unsigned thread_again() { return threadIdx.x; }
inline unsigned again(unsigned v) { return v; }
// One kernel runs at a time.
inline void let_next_begin() {}
inline void await_previous() {}
inline void copies_commit() { emulator::current->copies.emplace_back(); }
template <int Left>
void copies_wait() {
  auto& groups = emulator::current->copies;
  while (groups.size() > Left + 1) {  // the open group does not count
    for (const auto& c : groups.front()) make_copy(c);
    groups.erase(groups.begin());
  }
}

}  // namespace dst_ops
