// Which instruction set's kernels run here. Included by ops.cpp only.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>

#include "../diagonal.h"
#include "memory.h"

namespace dst_ops {
namespace {

enum class Isa { portable, avx2, avx512, avx512_48k };

// The best set that this processor runs; DST_OPS_ISA=portable|avx2|avx512|avx512_48k asks for a lower one (for tests; build.py checks it).
Isa isa() {
  static const Isa chosen = [] {
    Isa best = Isa::portable;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = Isa::avx2;
    if (best == Isa::avx2 && __builtin_cpu_supports("avx512f")) best = wide_first_level() ? Isa::avx512_48k : Isa::avx512;
#endif
    const char* name = std::getenv("DST_OPS_ISA");
    const std::string asked = name == nullptr ? "" : name;
    return std::min(best, asked == "portable" ? Isa::portable : asked == "avx2" ? Isa::avx2 : asked == "avx512" ? Isa::avx512 : Isa::avx512_48k);
  }();
  return chosen;
}

template <typename In>
const Kernels<In>& kernels();
#if defined(__x86_64__)
#define DST_OPS_CHOICE(name) isa() == Isa::avx512_48k ? avx512_48k::name : isa() == Isa::avx512 ? avx512::name : isa() == Isa::avx2 ? avx2::name : portable::name
#else
#define DST_OPS_CHOICE(name) portable::name
#endif
template <>
const Kernels<float>& kernels() {
  return DST_OPS_CHOICE(f32);
}
template <>
const Kernels<double>& kernels() {
  return DST_OPS_CHOICE(f64);
}
template <>
const Kernels<Bf16>& kernels() {
  return DST_OPS_CHOICE(bf16);
}
template <>
const Kernels<Fp16>& kernels() {
  return DST_OPS_CHOICE(fp16);
}
#undef DST_OPS_CHOICE

}  // namespace
}  // namespace dst_ops
