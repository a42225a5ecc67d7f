// Where the pieces of a window of columns lie in shared memory.
//
// A row of a window is a few lines of 128 bytes that begin where lines of memory do, so that one is copied at once: a copy to 128 bytes
// that lie across two lines takes twice as long, or fetches half as much again. Eight rows' pieces of 16 bytes of one column block must
// lie in different banks, and so piece i of a line is where piece i ^ row % 8 would be: with the row's part in an address already, an
// exclusive-or with 16 i gives the piece.
#pragma once

#include "platform.h"

namespace dst_ops {

// For the j-th column block of those that begin with block `before`, a multiple of Step, of a line: whether it lies in the line after
// that, and 16 times its piece.
template <int Step>
__device__ __forceinline__ bool in_next_line(unsigned j, unsigned before) {
  if (Step == 8) return j >= 8;
  if (Step == 4) return j >= 8 || (j >= 4 && before != 0);
  return j + before >= 8;
}
template <int Step>
__device__ __forceinline__ unsigned piece_bytes(unsigned j, unsigned before) {
  if (Step == 8) return j % 8 * 16;
  if (Step == 4) return ((j % 8) ^ (before & 4)) * 16;
  return (j + before) % 8 * 16;
}

}  // namespace dst_ops
