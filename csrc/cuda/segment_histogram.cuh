// Which elements one thread of segment_histogram looks at, and what it counts. Host code too.
#pragma once

#include "memory.cuh"

namespace zo::cuda {

constexpr int kHistogramBlock = 256;                      // threads
constexpr int64_t kHistogramPiece = 8 * kHistogramBlock;  // vectors that a block takes before it takes the next piece

// A digit: bits [low, high) of |x| in fp32.
struct Digit {
  uint32_t low, high, prefix;

  ZO_HD Digit(int32_t digit, int64_t prefix_)
      : low(digit == 0 ? 19 : digit == 1 ? 7 : 0), high(digit == 0 ? 31 : digit == 1 ? 19 : 7),
        prefix(static_cast<uint32_t>(prefix_)) {}
  template <class Add>
  ZO_HD void count(float value, const Add& add) const {
    const uint32_t magnitude = float_bits(value) & 0x7FFFFFFF;
    if (magnitude >> high == prefix) add(magnitude >> low & ((1u << (high - low)) - 1));
  }
};

// Vectors of a segment, counted from the one that holds its first element. The first and the last may reach outside.
template <class T>
struct Vectors {
  static constexpr int kLanes = 4 * T::kPerWord;
  int64_t start, end, base;  // the segment, and the element of x at which its first vector begins

  ZO_HD Vectors(const Segments& p, int64_t segment) {
    start = p.starts[segment], end = start + p.lengths[segment];
    uint64_t address = reinterpret_cast<uint64_t>(p.x) + static_cast<uint64_t>(start) * sizeof(typename T::Bits);
    base = start - static_cast<int64_t>(address % sizeof(Vector) / sizeof(typename T::Bits));
  }
  ZO_HD int64_t count() const { return start == end ? 0 : (end - base + kLanes - 1) / kLanes; }

  template <class Add>
  ZO_HD void count_vector(const Segments& p, int64_t vector, const Digit& digit, const Add& add) const {
    const int64_t n = base + vector * kLanes;
    if (n >= start && n + kLanes <= end) {
      const Vector data = *reinterpret_cast<const Vector*>(static_cast<const typename T::Bits*>(p.x) + n);
      ZO_UNROLL
      for (int w = 0; w < 4; ++w) {
        float value[2];
        T::unpack(data.word[w], value);
        ZO_UNROLL
        for (int k = 0; k < T::kPerWord; ++k) digit.count(value[k], add);
      }
      return;
    }
    for (int64_t m = n; m < n + kLanes; ++m) {
      if (m >= start && m < end) digit.count(load_one<T>(p.x, m), add);
    }
  }
};

}  // namespace zo::cuda
