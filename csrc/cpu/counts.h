// What depends on the magnitudes in a tile: bits of those below a threshold, and how many there are of each value.
#pragma once

#include "memory.h"

namespace zo {
inline namespace ZO_ISA {

// Bit i of `bits`: |x_i| <= threshold. The bits after the last element are 0.
template <class V, class T>
void mask_below(const void* values, int64_t count, float threshold, uint8_t* bits) {
  const T* x = static_cast<const T*>(values);
  __builtin_memset(bits, 0, static_cast<uint64_t>((count + 7) / 8));
  along<V>(count, [&](auto machine, int64_t i) {
    using M = decltype(machine);
    const uint32_t word = M::below(InOrder<M, T>::load(x + i), M::splat(threshold));
    if constexpr (M::kLanes > 1) {
      __builtin_memcpy(bits + i / 8, &word, M::kLanes / 8);
    } else {
      bits[i / 8] = static_cast<uint8_t>(bits[i / 8] | word << (i & 7));
    }
  });
}

// Adds 1 to counts[d] for each |x_i| whose digit is d and whose digits before it are `prefix`. The digits are bits 19
// to 30 of |x|, bits 7 to 18 and bits 0 to 6.
template <class V>
void count_digits(const float* x, int64_t count, uint32_t prefix, int digit, int64_t* counts) {
  const int low = digit == 0 ? 19 : digit == 1 ? 7 : 0, width = digit == 2 ? 7 : 12, high = low + width;
  const uint32_t mask = (1u << width) - 1;
  const auto add = [&](float value) {
    const uint32_t magnitude = float_bits(value) & 0x7FFFFFFF;
    if (magnitude >> high == prefix) ++counts[magnitude >> low & mask];
  };
  int64_t i = 0;
  if (digit > 0) {  // few elements have the prefix: most chunks are done with one comparison
    constexpr int kChunk = 32;
    for (; i + kChunk <= count; i += kChunk) {
      uint32_t found = 0;
      for (int j = 0; j < kChunk; ++j) found |= (float_bits(x[i + j]) & 0x7FFFFFFF) >> high == prefix ? 1u : 0u;
      for (int j = 0; found && j < kChunk; ++j) add(x[i + j]);
    }
  }
  for (; i < count; ++i) add(x[i]);
}

}  // namespace ZO_ISA
}  // namespace zo
