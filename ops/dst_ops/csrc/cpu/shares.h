// Items shared out among threads of unequal speed. Included by ops.cpp only.
//
// Cores differ: in kind, or because other guests of the machine keep half of one busy. Each thread begins with an equal range
// of adjacent items; one that has done its own takes half of what the slowest has still before it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace dst_ops {
namespace {

// Items 0 ... count - 1 that can be done in any order; run(begin, end) does some.
struct Work {
  int64_t count = 0;
  std::function<void(int64_t begin, int64_t end)> run = [](int64_t, int64_t) {};
};

class Shares {
 public:
  // Of items 0 ... count - 1; count: below 2^32.
  Shares(int64_t count, int64_t threads) : rest_(threads) {
    for (int64_t t = 0; t < threads; ++t) rest_[t].range = range(count * t / threads, count * (t + 1) / threads);
  }

  // The next items [first, second) for a thread: at most `most`, and half of its rest, as others may come for the other half.
  // first == second: none is left.
  std::pair<int64_t, int64_t> take(int64_t thread, int64_t most) {
    std::atomic<uint64_t>& own = rest_[thread].range;
    for (;;) {
      uint64_t seen = own;
      while (count(seen) > 0) {
        const int64_t to = begin(seen) + std::min(most, (count(seen) + 1) / 2);
        if (own.compare_exchange_weak(seen, range(to, end(seen)))) return {begin(seen), to};
      }
      std::atomic<uint64_t>& other = std::max_element(rest_.begin(), rest_.end(), [](const Rest& a, const Rest& b) { return count(a.range) < count(b.range); })->range;
      seen = other;
      if (count(seen) < 2) return {0, 0};  // a last item is quicker done by whoever has what it needs
      const int64_t from = end(seen) - count(seen) / 2;
      // Between the two steps the items are in no range: nobody else can take them.
      if (other.compare_exchange_strong(seen, range(begin(seen), from))) own = range(from, end(seen));
    }
  }

  int64_t threads() const { return static_cast<int64_t>(rest_.size()); }

 private:
  struct alignas(64) Rest {  // a line of the cache for each
    std::atomic<uint64_t> range;
  };
  static uint64_t range(int64_t begin, int64_t end) { return uint64_t(begin) << 32 | uint64_t(end); }
  static int64_t begin(uint64_t range) { return range >> 32; }
  static int64_t end(uint64_t range) { return range & 0xffffffff; }
  static int64_t count(uint64_t range) { return end(range) - begin(range); }
  std::vector<Rest> rest_;
};

// Calls f(take) for each thread, with take(most) as above. Results must not depend on who does an item. Of `before` each thread
// does an equal part first: who is late with that finds less left to do after it.
template <typename F>
void share_out(const Work& before, int64_t count, const F& f) {
  Shares shares(count, std::min<int64_t>(std::max(count, before.count), torch::stable::get_num_threads()));
  torch::stable::parallel_for(0, shares.threads(), 1, [&](int64_t thread, int64_t stop) {
    before.run(before.count * thread / shares.threads(), before.count * stop / shares.threads());
    // More than one where there are fewer threads than were asked for: a last item is left to a thread that would never come.
    for (; thread < stop; ++thread) f([&](int64_t most) { return shares.take(thread, most); });
  });
}

}  // namespace
}  // namespace dst_ops
