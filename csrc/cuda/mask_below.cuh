// What one thread of mask_below does: eight elements, which are a byte of the mask and one threshold's. Host code too.
#pragma once

#include "memory.cuh"

namespace zo::cuda {

ZO_HD uint32_t below_bit(uint32_t bits, float threshold, int at) {
  return static_cast<uint32_t>(bits_float(bits & 0x7FFFFFFF) <= threshold) << at;
}

template <class T>
ZO_HD void mask_byte(uint8_t* bits, const void* x, const float* thresholds, int64_t count, bool aligned, int64_t byte) {
  constexpr int kVectors = 2 / T::kPerWord;  // that hold 8 elements
  const int64_t n = 8 * byte;
  const float threshold = thresholds[n >> 10];
  uint32_t result = 0;
  if (aligned && n + 8 <= count) {
    const Vector* from = reinterpret_cast<const Vector*>(static_cast<const typename T::Bits*>(x) + n);
    ZO_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Vector data = from[v];
      ZO_UNROLL
      for (int w = 0; w < 4; ++w) {
        float value[2];
        T::unpack(data.word[w], value);
        ZO_UNROLL
        for (int k = 0; k < T::kPerWord; ++k) {
          result |= below_bit(float_bits(value[k]), threshold, (v * 4 + w) * T::kPerWord + k);
        }
      }
    }
  } else {
    for (int k = 0; k < 8 && n + k < count; ++k) result |= below_bit(float_bits(load_one<T>(x, n + k)), threshold, k);
  }
  bits[byte] = static_cast<uint8_t>(result);
}

}  // namespace zo::cuda
