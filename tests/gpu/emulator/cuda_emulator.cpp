#include "cuda_emulator.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#include <cstdlib>
#include <mutex>

namespace emulator {

State state;
Fiber* current;

namespace {

constexpr size_t stack_bytes = 64 * 1024;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::mutex one_launch;  // autograd has threads of its own

void entry() {
  state.body();
  current->done = true;
  for (;;) yield();
}

void prepare(Fiber& f, unsigned i) {
  const dim3 size = state.block_size;
  f.thread = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
  f.lane = i % 32;
  f.warp = &warps[i / 32];
  f.done = false;
  f.copies.assign(1, {});
  void** sp = reinterpret_cast<void**>(f.stack + stack_bytes - 64);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(&entry);
  for (int k = 0; k < 6; ++k) *--sp = nullptr;  // the registers that the switch restores
  f.stack_pointer = sp;
}

unsigned turn(unsigned j, unsigned count, unsigned shift) {
  if (state.order == 1) return count - 1 - j;
  if (state.order == 2) return (j * 10007 + shift) % count;  // a prime above every count: each turn once
  return j;
}

// Each thread of a warp once; whether that led any of them on.
bool run_warp(unsigned w, unsigned& left, unsigned shift) {
  const unsigned before = left, passed = state.passed + warps[w].passed, events = state.events;
  const int arrived = state.arrived + warps[w].arrived;
  for (unsigned j = 0; j < 32; ++j) {
    Fiber& f = fibers[w * 32 + turn(j, 32, shift)];
    if (f.done) continue;
    current = &f;
    dst_ops_emulator_switch(&state.host, f.stack_pointer);
    if (!state.error.empty()) throw std::runtime_error(state.error);
    if (f.done) --left;
  }
  return left != before || state.passed + warps[w].passed != passed || state.arrived + warps[w].arrived != arrived || state.events != events;
}

void run_block(unsigned count) {
  state.memory.assign(state.memory_bytes + 128, 0xff);  // NaN in every type
  state.arrived = 0, state.passed = 0, state.threads = count;
  state.landings.clear();
  warps.assign((count + 31) / 32, Warp());
  for (unsigned i = 0; i < count; ++i) prepare(fibers[i], i);
  unsigned left = count, random = 12345;
  while (left) {
    bool moved = false;
    random = random * 1664525u + 1013904223u;
    // A warp goes on until its threads can't: nothing but __syncthreads keeps warps together.
    for (unsigned j = 0; j < warps.size(); ++j) {
      const unsigned w = turn(j, warps.size(), random >> 8);
      while (run_warp(w, left, random >> 4)) moved = true;
    }
    if (!moved) throw std::runtime_error("emulator: threads wait at different barriers");
  }
  if (state.arrived) throw std::runtime_error("emulator: a block ended while threads waited at __syncthreads");
  if (!state.landings.empty()) throw std::runtime_error("emulator: a block ended while copies were on their way");
}

}  // namespace

void fail(const char* message) {
  state.error = message;
  for (;;) yield();
}

void launch(dim3 grid, dim3 block, size_t bytes, std::function<void()> body) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const unsigned count = block.x * block.y * block.z;
  if (count == 0 || count > 1024 || count % 32 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("emulator: a launch that CUDA refuses");
  if (bytes > size_t(dst_ops::emulator_shared_memory())) throw std::runtime_error("emulator: more shared memory than a block may have");
  state.grid_size = grid, state.block_size = block, state.memory_bytes = bytes, state.body = std::move(body), state.error.clear();
  while (fibers.size() < count) {
    fibers.emplace_back();
    fibers.back().stack = static_cast<char*>(aligned_alloc(64, stack_bytes));
  }
  try {
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          state.block = dim3(x, y, z);
          run_block(count);
        }
  } catch (...) {
    for (Fiber& f : fibers) free(f.stack);  // what the threads left on them is nothing to begin with
    fibers.clear();
    throw;
  }
}

}  // namespace emulator

#define DST_OPS_EXPORT extern "C" __attribute__((visibility("default")))
DST_OPS_EXPORT void dst_ops_emulator_set(int order, int count_banks, int major) {
  emulator::state.order = order, emulator::state.count_banks = count_banks, emulator::state.major = major;
}
DST_OPS_EXPORT void dst_ops_emulator_counts(int64_t* to) {
  std::copy(emulator::state.counts, emulator::state.counts + emulator::counters, to);
  std::fill(emulator::state.counts, emulator::state.counts + emulator::counters, 0);
}

asm(R"(
.pushsection .text
.globl dst_ops_emulator_switch
.type dst_ops_emulator_switch,@function
dst_ops_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dst_ops_emulator_switch,.-dst_ops_emulator_switch
.popsection
)");
