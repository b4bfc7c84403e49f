// How the three element types lie in memory: 16 bytes a thread and access, taken apart word by word.
#pragma once

#include "device_noise.cuh"

namespace zo::cuda {

struct alignas(16) Vector {
  uint32_t word[4];
};

// One access. Left to the compiler, the words of a vector that were made one by one may be stored one by one.
ZO_HD void store_vector(void* to, const Vector& v) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
#else
  *static_cast<Vector*>(to) = v;
#endif
}

ZO_HD void store_words(void* to, const uint32_t (&word)[4]) {
  store_vector(to, {{word[0], word[1], word[2], word[3]}});
}

ZO_HD void store_words(void* to, const uint32_t (&word)[2]) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v2.b32 [%0], {%1, %2};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(word[0]), "r"(word[1])
               : "memory");
#else
  static_cast<uint32_t*>(to)[0] = word[0];
  static_cast<uint32_t*>(to)[1] = word[1];
#endif
}

// kPerWord elements in a 32-bit word, element 0 in the low bits. `random` holds 16 bits for each element; values go
// through `quiet` before they are rounded stochastically.
struct Float32 {
  using Bits = uint32_t;
  static constexpr int kPerWord = 1;
  static ZO_HD void unpack(uint32_t word, float* value) { value[0] = bits_float(word); }
  static ZO_HD uint32_t pack(const float* value) { return float_bits(value[0]); }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr int kPerWord = 2;
  static ZO_HD void unpack(uint32_t word, float* value) {
    value[0] = bits_float(word << 16);
    value[1] = bits_float(word & 0xFFFF0000u);
  }
  static ZO_HD uint32_t pack(const float* value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(value[1]), "f"(value[0]));
    return word;
#else
    return to_bf16_nearest(value[0]) | static_cast<uint32_t>(to_bf16_nearest(value[1])) << 16;
#endif
  }
  // Any NaN becomes the one whose low bits are 0, so that random bits cannot carry out of it. Asking about all values
  // at once costs half an instruction for each; taking care of each would cost two.
  template <int count>
  static ZO_HD void quiet(float* value) {
    bool nan = false;
    ZO_UNROLL
    for (int i = 0; i < count; i += 2) nan |= value[i] != value[i] || value[i + 1] != value[i + 1];
    if (!nan) return;
    ZO_UNROLL
    for (int i = 0; i < count; ++i) value[i] = value[i] == value[i] ? value[i] : bits_float(0x7FC00000u);
  }
  // `to_bf16_stochastic` without its own look at NaN.
  static ZO_HD uint32_t pack_stochastic(const float* value, const uint32_t* random) {
    uint32_t low = float_bits(value[0]) + random[0], high = float_bits(value[1]) + random[1];
    return low >> 16 | (high & 0xFFFF0000u);
  }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr int kPerWord = 2;
  static ZO_HD void unpack(uint32_t word, float* value) {
#if defined(__CUDA_ARCH__)
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(value[0]), "=f"(value[1])
        : "r"(word));
#else
    value[0] = from_fp16(static_cast<uint16_t>(word));
    value[1] = from_fp16(static_cast<uint16_t>(word >> 16));
#endif
  }
  static ZO_HD uint32_t pack(const float* value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(value[1]), "f"(value[0]));
    return word;
#else
    return to_fp16_nearest(value[0]) | static_cast<uint32_t>(to_fp16_nearest(value[1])) << 16;
#endif
  }
  template <int count>
  static ZO_HD void quiet(float*) {}
  static ZO_HD uint32_t pack_stochastic(const float* value, const uint32_t* random) {
    return to_fp16_stochastic(value[0], random[0]) |
           static_cast<uint32_t>(to_fp16_stochastic(value[1], random[1])) << 16;
  }
};

// One element alone, for places where a vector does not fit.
template <class T>
ZO_HD float load_one(const void* base, int64_t n) {
  float value[2];
  T::unpack(static_cast<const typename T::Bits*>(base)[n], value);
  return value[0];
}

template <class T>
ZO_HD void store_one(void* base, int64_t n, uint32_t word) {
  static_cast<typename T::Bits*>(base)[n] = static_cast<typename T::Bits>(word);
}

}  // namespace zo::cuda
