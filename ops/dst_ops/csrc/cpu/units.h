// The active part of the weight. Included by ops.cpp only.
#pragma once

#include <cstdint>
#include <vector>

namespace dst_ops {
namespace {

// Adjacent diagonals offset ... offset + width - 1, stored in `values` from row slot on.
struct Unit {
  int64_t offset, slot;
};

// In ascending order.
struct Units {
  std::vector<Unit> list;
  int64_t width;
};

}  // namespace
}  // namespace dst_ops
