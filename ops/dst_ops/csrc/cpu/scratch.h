// Memory that a thread keeps for its next call. Included by ops.cpp only.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace dst_ops {
namespace {

enum { packed_id, rows_id, sums_id, values_id };

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
  return block.get();
}

}  // namespace
}  // namespace dst_ops
