// How values stand in memory, and the portable machine's way of reading and writing them.
#pragma once

#include "../noise.h"

namespace zo {
inline namespace ZO_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Memory<V, T> loads and stores kHalves vectors of V::kLanes values of type T at once, as fp32. With one half, they
// stand in memory order; with two, the first vector holds the values at even places and the second those at odd ones,
// which lets a 16-bit type be taken apart and put together without a shuffle.
//   load(p, F (&a)[kHalves]);  store(p, a)  to nearest even;  store(p, a, U (&random16)[kHalves])  stochastically
template <class V, class T>
struct Memory;

template <>
struct Memory<Scalar, float> {
  static constexpr int kHalves = 1;
  static ZO_HD void load(const float* p, float (&a)[1]) { a[0] = *p; }
  static ZO_HD void store(float* p, const float (&a)[1]) { *p = a[0]; }
};

template <>
struct Memory<Scalar, BFloat16> {
  static constexpr int kHalves = 1;
  static ZO_HD void load(const BFloat16* p, float (&a)[1]) { a[0] = from_bf16(p->bits); }
  static ZO_HD void store(BFloat16* p, const float (&a)[1]) { p->bits = to_bf16_nearest(a[0]); }
  static ZO_HD void store(BFloat16* p, const float (&a)[1], const uint32_t (&random16)[1]) {
    p->bits = to_bf16_stochastic(a[0], random16[0]);
  }
};

template <>
struct Memory<Scalar, Float16> {
  static constexpr int kHalves = 1;
  static ZO_HD void load(const Float16* p, float (&a)[1]) { a[0] = from_fp16(p->bits); }
  static ZO_HD void store(Float16* p, const float (&a)[1]) { p->bits = to_fp16_nearest(a[0]); }
  static ZO_HD void store(Float16* p, const float (&a)[1], const uint32_t (&random16)[1]) {
    p->bits = to_fp16_stochastic(a[0], random16[0]);
  }
};

// One vector at a time in memory order, for kernels that also keep fp32 tensors of x's shape, where taking those apart
// would cost more than putting x together.
template <class V, class T>
struct InOrder {
  static ZO_HD typename V::F load(const T* p) {
    typename V::F a[1];
    Memory<V, T>::load(p, a);
    return a[0];
  }
  static ZO_HD void store(T* p, typename V::F a) {
    const typename V::F one[1] = {a};
    Memory<V, T>::store(p, one);
  }
  static ZO_HD void store(T* p, typename V::F a, typename V::U random16) {
    const typename V::F one[1] = {a};
    const typename V::U random[1] = {random16};
    Memory<V, T>::store(p, one, random);
  }
};

// body(machine, i) for whole vectors of a row, then for what is left.
template <class V, class Body>
ZO_HD void along(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) body(V{}, i);
  for (; i < count; ++i) body(Scalar{}, i);
}

// Bits at .. at + n - 1 of a little-endian string of bits; n divides at.
template <int n>
ZO_HD uint32_t bits_at(const uint8_t* bits, int at) {
  uint32_t word = 0;
  __builtin_memcpy(&word, bits + at / 8, (n + 7) / 8);
  return n < 8 ? word >> (at & 7) : word;
}

// fp32 values in the order that a Memory of one or two halves has.
static ZO_HD void load_halves(const float* p, float (&a)[1]) { a[0] = *p; }

}  // namespace ZO_ISA
}  // namespace zo
