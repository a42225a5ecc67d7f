// Machine code for the product with one list of diagonals (x86-64). Included by ops.cpp only.
//
// All tiles of outputs meet the same diagonals at the same distances: output a of a tile reads row start + d + a of the
// input, counted from the tile. So the loop over diagonals is written out, once per call: for each row of the input in
// turn, load it, and for each output that it meets, broadcast the weight and multiply. Sums stay in registers, whose
// numbers are part of the code: no compiled loop can do that with offsets known only now. All diagonals that read a row
// share its load; where there is one only, its multiply-adds read it from memory.
//
// Encodings: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, sections 2.3 (VEX) and 2.7 (EVEX).
#pragma once

#if defined(__x86_64__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "../diagonal.h"

namespace dst_ops {
namespace {

// Pages that hold writable bytes until execute(), then executable ones: never both.
class CodePages {
 public:
  explicit CodePages(size_t size) : size_(size) {
#if defined(__x86_64__)
    void* const pages = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages != MAP_FAILED) pages_ = pages;
#endif
  }
  CodePages(const CodePages&) = delete;
  CodePages& operator=(const CodePages&) = delete;
  ~CodePages() { free(); }

  // nullptr where the system refuses.
  uint8_t* writable() { return static_cast<uint8_t*>(pages_); }
  const uint8_t* execute() {
#if defined(__x86_64__)
    if (pages_ != nullptr && mprotect(pages_, size_, PROT_READ | PROT_EXEC) != 0) free();
#endif
    return static_cast<const uint8_t*>(pages_);
  }

 private:
  void free() {
#if defined(__x86_64__)
    if (pages_ != nullptr) munmap(pages_, size_);
#endif
    pages_ = nullptr;
  }
  void* pages_ = nullptr;
  size_t size_;
};

// Whether the system lets a process run code that it wrote.
bool may_generate() {
  static const bool may = [] {
    CodePages pages(1);
    return pages.writable() != nullptr && pages.execute() != nullptr;
  }();
  return may;
}

// sums[a][v] += weight[unit][d][a] * x[start[unit] + d + a][v] over outputs a, vectors v of tokens, units and their
// diagonals d, for all rows of x or those of some sections.
template <typename T>
class Program {
 public:
  // Registers hold outputs * vectors sums, `vectors` vectors of x and one weight; vector_bytes is 32 or 64.
  Program(const std::vector<int>& start, int64_t width, int64_t rows, int outputs, int vectors, int vector_bytes)
      : outputs_(outputs), vectors_(vectors), vector_bytes_(vector_bytes) {
    if (!may_generate() || vector_bytes < 32) return;
    const int64_t count = static_cast<int64_t>(start.size()), reach = outputs + width - 1, registers = outputs * vectors;
    const int64_t sections = (rows + section_rows - 1) / section_rows, most = 12;  // bytes of an instruction, not more
    pages_ = std::make_unique<CodePages>(64 + 3 * most * registers + sections * (3 * most + section_rows * most * vectors) +
                                         count * width * outputs * most * (2 + vectors));
    uint8_t* const code = pages_->writable();
    if (code == nullptr) return;
    at_ = code;
    for (int r = 0; r < registers; ++r) move(store, r, rdx, r);
    put({0xc5, 0xf8, 0x77, 0xc3});  // vzeroupper; ret
    const int64_t zero = at_ - code;
    for (int r = 0; r < registers; ++r) instruction(1, 1, false, 0xef, r, r, r), put({0xc0 | (r & 7) << 3 | (r & 7)});  // vpxor, vpxord
    put({0xff, 0xe1});          // jmp rcx
    const int64_t add = at_ - code;
    for (int r = 0; r < registers; ++r) move(load, r, rdx, r);
    put({0xff, 0xe1});
    int64_t low = 0, high = 0;  // units that meet the row
    std::vector<std::pair<int, int64_t>> met;  // outputs that do, and their weights
    for (int64_t s = 0; s < sections; ++s) {
      entries_.push_back({at_ - code, weight_});
      for (int64_t r = 0; r < section_rows; ++r) {
        const int64_t row = s * section_rows + r;
        while (high < count && start[high] <= row) ++high;
        while (low < high && start[low] + reach <= row) ++low;
        met.clear();
        for (int64_t e = low; e < high; ++e)
          for (int64_t d = 0; d < width; ++d)
            if (const int64_t a = row - start[e] - d; a >= 0 && a < outputs) met.push_back({static_cast<int>(a), (e * width + d) * outputs + a});
        const bool alone = met.size() == 1;  // then no load of its own
        for (int v = 0; v < vectors && !alone && !met.empty(); ++v) move(load, registers + v, rdi, r * vectors + v);
        for (const auto& [a, weight] : met) multiply_add(a, weight, alone ? std::optional(r) : std::nullopt);
      }
      advance(rdi, section_rows * vectors * vector_bytes);
      put({0x41, 0x81, 0xf8});  // cmp r8d, s + 1
      word(s + 1);
      put({0x0f, 0x84});  // je the stores
      word(code - (at_ + 4));
    }
    size_ = at_ - code;
    code_ = pages_->execute();
    zero_ = reinterpret_cast<Run>(reinterpret_cast<uintptr_t>(code_) + zero);
    add_ = reinterpret_cast<Run>(reinterpret_cast<uintptr_t>(code_) + add);
  }

  bool ready() const { return code_ != nullptr; }
  int64_t size() const { return size_; }

  // Rows of sections first ... last - 1 only, with sums that begin at zero or continue. weight: of unit 0, though those of
  // units that no such row meets are not read.
  void run(const T* x, const T* weight, T* sums, int64_t first, int64_t last, bool continues) const {
    const int64_t row = vectors_ * vector_bytes_ / int64_t(sizeof(T));
    (continues ? add_ : zero_)(x + first * section_rows * row, weight + entries_[first].weight, sums, code_ + entries_[first].code, last);
  }

 private:
  typedef void (*Run)(const T* x, const T* weight, T* sums, const uint8_t* entry, int64_t last);  // rdi, rsi, rdx, rcx, r8
  enum Base { rdx = 2, rsi = 6, rdi = 7 };
  enum Move { load = 0x10, store = 0x11 };
  struct Entry {
    int64_t code, weight;  // distance from the beginning; the weight that rsi points to
  };

  // row: of the section, where x is read from memory.
  void multiply_add(int a, int64_t weight, std::optional<int64_t> row) {
    const int x = outputs_ * vectors_, w = x + vectors_;
    const bool f64 = sizeof(T) == 8, evex = vector_bytes_ == 64;
    const int64_t behind = 120 / (evex ? 1 : sizeof(T));  // keeps most displacements in one byte
    if (weight - weight_ < -behind || weight - weight_ > behind) {
      advance(rsi, (weight + behind - weight_) * int64_t(sizeof(T)));
      weight_ = weight + behind;
    }
    if (evex && vectors_ == 1 && !row) {  // nothing else needs the weight
      instruction(2, 1, f64, 0xb8, a, x);
      at_[-2] |= 0x10;  // broadcasts the operand in memory
      memory(a, rsi, weight - weight_, sizeof(T));
      return;
    }
    instruction(2, 1, f64 && evex, f64 ? 0x19 : 0x18, w, 0);  // vbroadcastss, vbroadcastsd
    memory(w, rsi, weight - weight_, sizeof(T));
    for (int v = 0; v < vectors_; ++v) {
      const int sum = a * vectors_ + v;
      instruction(2, 1, f64, 0xb8, sum, w, row ? 0 : x + v);  // vfmadd231ps, vfmadd231pd
      if (row) memory(sum, rdi, *row * vectors_ + v, vector_bytes_);
      else put({0xc0 | (sum & 7) << 3 | ((x + v) & 7)});
    }
  }

  // vmovups between a register and the index-th vector behind base.
  void move(Move opcode, int reg, Base base, int64_t index) {
    instruction(1, 0, false, opcode, reg, 0);
    memory(reg, base, index, vector_bytes_);
  }

  void advance(Base reg, int64_t bytes) {
    put({0x48, 0x81, 0xc0 | reg});
    word(bytes);
  }

  // Prefix (EVEX for 512 bits, VEX for 256) and opcode; the bits of register numbers are inverted in the prefix.
  void instruction(int map, int pp, bool w, int opcode, int reg, int vvvv, int rm = 0) {
    const int reg3 = ~reg >> 3 & 1, reg4 = ~reg >> 4 & 1, rm3 = ~rm >> 3 & 1, rm4 = ~rm >> 4 & 1;
    if (vector_bytes_ == 64)
      put({0x62, reg3 << 7 | rm4 << 6 | rm3 << 5 | reg4 << 4 | map, w << 7 | (~vvvv & 15) << 3 | 4 | pp, 0x40 | (~vvvv >> 4 & 1) << 3, opcode});
    else
      put({0xc4, reg3 << 7 | 0x40 | rm3 << 5 | map, w << 7 | (~vvvv & 15) << 3 | 4 | pp, opcode});
  }

  // The operand [base + index * size]; EVEX counts a displacement of one byte in operands.
  void memory(int reg, Base base, int64_t index, int64_t size) {
    const int64_t small = vector_bytes_ == 64 ? index : index * size;
    const bool fits = small >= -128 && small < 128;
    put({(fits ? 0x40 : 0x80) | (reg & 7) << 3 | base});
    if (fits) put({static_cast<int>(small & 255)});
    else word(index * size);
  }

  void put(std::initializer_list<int> bytes) {
    for (const int b : bytes) *at_++ = static_cast<uint8_t>(b);
  }
  void word(int64_t value) {
    const int32_t v = static_cast<int32_t>(value);
    std::memcpy(at_, &v, 4);
    at_ += 4;
  }

  const int outputs_, vectors_, vector_bytes_;
  std::unique_ptr<CodePages> pages_;
  uint8_t* at_ = nullptr;
  int64_t weight_ = 0, size_ = 0;
  std::vector<Entry> entries_;
  const uint8_t* code_ = nullptr;
  Run zero_ = nullptr, add_ = nullptr;  // begin with sums of zero, with those in memory
};

// Most bytes of programs kept.
constexpr int64_t kept_code = 64 << 20;

// The program, kept for the next call with these arguments: offsets change once in many steps.
template <typename T>
std::shared_ptr<const Program<T>> program_for(const std::vector<int>& start, int64_t width, int64_t rows, int outputs, int vectors, int vector_bytes) {
  static std::mutex mutex;
  static std::map<std::vector<int>, std::shared_ptr<const Program<T>>> kept;
  static int64_t bytes = 0;
  std::vector<int> key(start);
  key.push_back(static_cast<int>(width));
  key.push_back(static_cast<int>(rows));
  const std::lock_guard<std::mutex> guard(mutex);
  const auto found = kept.find(key);
  if (found != kept.end()) return found->second;
  auto made = std::make_shared<const Program<T>>(start, width, rows, outputs, vectors, vector_bytes);
  if (bytes + made->size() > kept_code) kept.clear(), bytes = 0;
  bytes += made->size();
  kept.emplace(std::move(key), made);
  return made;
}

}  // namespace
}  // namespace dst_ops
