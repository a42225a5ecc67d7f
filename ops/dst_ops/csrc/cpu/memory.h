// Memory that a thread keeps for its next call, and what depends on the first-level cache. Included by ops.cpp only.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dst_ops {
namespace {

// Whether the first-level cache is larger than 32 KiB. Such processors (Intel since Ice Lake, AMD since Zen 5) also load lines of
// 64 bytes whole, where those before them that have such vectors at all may take two halves.
bool wide_first_level() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const bool wide = sysconf(_SC_LEVEL1_DCACHE_SIZE) > 32 * 1024;
  return wide;
#else
  return false;
#endif
}

enum { packed_id, rows_id, sums_id, gradient_id, token_sums_id, parts_id };

// One block for each ID, aligned to a cache line, content undefined: pages fresh from the system would cost more than
// what is written to them.
template <typename T, int ID>
T* scratch(int64_t count) {
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<T, Free> block;
  thread_local int64_t capacity = 0;
  if (count > capacity) {
    block.reset();
    capacity = 0;
    block.reset(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))));
    capacity = count;
  }
#if defined(__SANITIZE_ADDRESS__)
  // What an earlier, larger call left behind is out of bounds too.
  ASAN_UNPOISON_MEMORY_REGION(block.get(), capacity * sizeof(T));
  ASAN_POISON_MEMORY_REGION(block.get() + count, (capacity - count) * sizeof(T));
#endif
  return block.get();
}

}  // namespace
}  // namespace dst_ops
