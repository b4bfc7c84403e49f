// Several vectors of a machine as one machine.
#pragma once

#include "memory.h"

namespace zo {
inline namespace ZO_ISA {

// The machine of N vectors of V: each operation is done on all of them before the next one. A chain of dependent
// operations then has N - 1 independent ones between any two, which is what keeps the units of a core busy.
template <class V, int N>
struct Pack {
  struct F {
    typename V::F v[N];
  };
  struct U {
    typename V::U v[N];
  };
  static ZO_HD F splat(float value) {
    F result;
    ZO_UNROLL
    for (int i = 0; i < N; ++i) result.v[i] = V::splat(value);
    return result;
  }
  static ZO_HD U splat(uint32_t value) {
    U result;
    ZO_UNROLL
    for (int i = 0; i < N; ++i) result.v[i] = V::splat(value);
    return result;
  }
#define ZO_EACH(Result, name, Params, ...) \
  static ZO_HD Result name Params { \
    Result result; \
    ZO_UNROLL for (int i = 0; i < N; ++i) result.v[i] = __VA_ARGS__; \
    return result; \
  }
  ZO_EACH(U, bits, (F a), V::bits(a.v[i]))
  ZO_EACH(F, floats, (U a), V::floats(a.v[i]))
  ZO_EACH(F, to_float, (U a), V::to_float(a.v[i]))
  ZO_EACH(F, fma, (F a, F b, F c), V::fma(a.v[i], b.v[i], c.v[i]))
  ZO_EACH(F, mul, (F a, F b), V::mul(a.v[i], b.v[i]))
  ZO_EACH(F, add, (F a, F b), V::add(a.v[i], b.v[i]))
  ZO_EACH(F, sqrt, (F a), V::sqrt(a.v[i]))
  ZO_EACH(U, add, (U a, U b), V::add(a.v[i], b.v[i]))
  ZO_EACH(U, sub, (U a, U b), V::sub(a.v[i], b.v[i]))
  ZO_EACH(U, bit_and, (U a, U b), V::bit_and(a.v[i], b.v[i]))
  ZO_EACH(U, bit_xor, (U a, U b), V::bit_xor(a.v[i], b.v[i]))
  ZO_EACH(U, xor_and, (U a, U b, U c), V::xor_and(a.v[i], b.v[i], c.v[i]))
  template <int n>
  ZO_EACH(U, shl, (U a), V::template shl<n>(a.v[i]))
  template <int n>
  ZO_EACH(U, shr, (U a), V::template shr<n>(a.v[i]))
  template <int bit>
  ZO_EACH(F, select, (U word, F clear, F set), V::template select<bit>(word.v[i], clear.v[i], set.v[i]))
#undef ZO_EACH
};

}  // namespace ZO_ISA
}  // namespace zo
