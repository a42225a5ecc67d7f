// Two limits of a machine, for op_cpu.py: the fused multiply-adds it does with all operands in registers, and with one
// operand in the first-level cache, as in a sparse product that loads a window of its input for each of them. Both use
// the widest vectors that the compiler targets.

#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

// Enough independent sums to hide the latency, few enough to stay in registers beside their operands.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24;
#else
constexpr int kSums = 12;
#endif

typedef float Vector __attribute__((vector_size(kBytes)));

constexpr int kLanes = kBytes / sizeof(float);
constexpr int kBlocks = 8;  // of kSums vectors each: the loads walk over 12 KiB at most

// Loops over the sums are unrolled, all of them: only then does the compiler keep the array in registers.
#define EACH_SUM _Pragma("GCC unroll 24") for (int i = 0; i < kSums; ++i)

namespace {

// Different sums, or the compiler would compute one for all.
void start(Vector* sums) { EACH_SUM sums[i] = Vector{} + float(i); }

float total(const Vector* sums) {
  Vector all{};
  EACH_SUM all += sums[i];
  return all[0];
}

float from_registers(long rounds, float factor) {
  Vector sums[kSums];
  start(sums);
  const Vector a = Vector{} + factor;
  for (long block = 0; block < rounds * kBlocks; ++block) EACH_SUM sums[i] = sums[i] * a + a;
  return total(sums);
}

float from_cache(long rounds, float factor) {
  alignas(64) Vector loaded[kBlocks * kSums] = {};
  Vector sums[kSums];
  start(sums);
  const Vector a = Vector{} + factor;
  for (long round = 0; round < rounds; ++round) {
    asm volatile("" : : "r"(loaded) : "memory");  // what lies there may have changed: no load can be left out
    for (int block = 0; block < kBlocks; ++block) EACH_SUM sums[i] += a * loaded[block * kSums + i];
  }
  return total(sums);
}

}  // namespace

// `rounds` rounds on each of `threads` threads. factor, below 1 so that the sums stay small, and sink [threads] come
// from outside so that nothing is known when this is compiled. Returns the floating-point operations done.
extern "C" double multiply_add(int threads, long rounds, int load, float factor, float* sink) {
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t)
    workers.emplace_back([=] { sink[t] = load ? from_cache(rounds, factor) : from_registers(rounds, factor); });
  for (auto& worker : workers) worker.join();
  return 2.0 * kLanes * kSums * kBlocks * rounds * threads;
}
