// The words of whole tiles of Philox calls.
#pragma once

#include "api.h"
#include "memory.h"

namespace zo {
inline namespace ZO_ISA {

using cpu::Key;

// Four rows of 256 words: those of the calls block .. block + 255, where block is a multiple of 256. Meanwhile the
// `stride` bytes per call at `ahead`, which the next step will read, are fetched.
//
// A round is, with 64-bit products p = m1 c and q = m0 a:
//   a' = high(p) ^ low(p of the round before) ^ key,   c' = high(q) ^ low(q of the round before) ^ key.
// Words live in the low halves of 64-bit lanes, whose high halves hold what the product left there. In rounds 1 to 3
// much is the same for all calls of a tile, as their counters differ in the low word alone: the first q is a ramp, and
// the second one and the first p are numbers.
//
// Where three words cannot be xored at once, the keys of two rounds go into every other product in one step: its high
// half takes the key of this round and its low half, which counts one round later, that of the next.
template <class V, bool kPaired>
struct PhiloxTile {
  using W = typename V::W;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kChains = 4;  // two vectors of calls, each split into even and odd ones

  static W both(uint32_t high, uint32_t low) { return V::splat64(static_cast<uint64_t>(high) << 32 | low); }

  __attribute__((noinline)) static void run(uint32_t* words, const Key& key, uint64_t block, uint32_t stream,
                                            const char* ahead, int stride) {
    const uint32_t low = static_cast<uint32_t>(block), high = static_cast<uint32_t>(block >> 32);
    const uint64_t p1 = static_cast<uint64_t>(table::PHILOX_M1) * stream;
    const uint32_t a1 = static_cast<uint32_t>(p1 >> 32) ^ high ^ key.k0[0];
    const uint64_t q2 = static_cast<uint64_t>(table::PHILOX_M0) * a1;

    // Index r: for the product of round r + 1. The numbers of rounds 1 and 2 are merged with their keys.
    W a_keys[cpu::kRounds], c_keys[cpu::kRounds];
    c_keys[0] = both(key.k1[0], static_cast<uint32_t>(q2 >> 32) ^ key.k1[1]);
    a_keys[1] = both(static_cast<uint32_t>(p1) ^ key.k0[1], key.k0[2]);
    c_keys[2] = both(static_cast<uint32_t>(q2) ^ key.k1[2], key.k1[3]);
    for (int r = 3; r < cpu::kRounds; ++r) {
      const int next = r + 1 < cpu::kRounds ? r + 1 : r;
      a_keys[r] = both(key.k0[r], V::kXor3 ? key.k0[r] : key.k0[next]);
      c_keys[r] = both(key.k1[r], V::kXor3 ? key.k1[r] : key.k1[next]);
    }
    const W m0 = V::splat(table::PHILOX_M0), m1 = V::splat(table::PHILOX_M1);

    constexpr uint64_t factor = table::PHILOX_M0;
    constexpr int step = kPaired ? 4 : 2;
    const W ramp[kChains] = {V::ramp(factor, 0, step), V::ramp(factor, kPaired ? 2 : 1, step),
                             V::ramp(factor, kPaired ? 1 : kLanes, step),
                             V::ramp(factor, kPaired ? 3 : kLanes + 1, step)};
    W start = V::splat64(factor * low);
    const W advance = V::splat64(factor * (2 * kLanes));

    for (int lane = 0; lane < 256; lane += 2 * kLanes) {
      for (int byte = 0; byte < 2 * kLanes * stride; byte += 64) __builtin_prefetch(ahead + lane * stride + byte, 1);
      W a[kChains], b[kChains], c[kChains], d[kChains];  // b and d: the products of the round before
      ZO_UNROLL
      for (int i = 0; i < kChains; ++i) {
        W q = V::bit_xor(V::add64(start, ramp[i]), c_keys[0]);  // round 1
        W p = V::multiply(m1, V::high(q));                      // round 2
        b[i] = V::bit_xor(p, a_keys[1]);
        a[i] = V::high(b[i]);
        p = V::multiply(m1, q);                                 // round 3
        d[i] = V::bit_xor(V::multiply(m0, a[i]), c_keys[2]);
        a[i] = V::bit_xor(V::high(p), b[i]);
        b[i] = p;
        c[i] = V::high(d[i]);
      }
      start = V::add64(start, advance);
      if constexpr (V::kXor3) {
        ZO_UNROLL
        for (int r = 3; r < cpu::kRounds - 1; ++r) {
          ZO_UNROLL
          for (int i = 0; i < kChains; ++i) {
            W q = V::multiply(m0, a[i]), p = V::multiply(m1, c[i]);
            a[i] = V::xor3(V::high(p), b[i], a_keys[r]);
            b[i] = p;
            c[i] = r == 3 ? V::bit_xor(V::high(q), d[i]) : V::xor3(V::high(q), d[i], c_keys[r]);
            d[i] = q;
          }
        }
      } else {
        ZO_UNROLL
        for (int r = 3; r < cpu::kRounds - 1; r += 2) {
          ZO_UNROLL
          for (int i = 0; i < kChains; ++i) {
            W q = V::multiply(m0, a[i]), p = V::bit_xor(V::multiply(m1, c[i]), a_keys[r]);
            a[i] = V::bit_xor(V::high(p), b[i]);
            b[i] = p;
            c[i] = V::bit_xor(V::high(q), d[i]);
            d[i] = q;
          }
          ZO_UNROLL
          for (int i = 0; i < kChains; ++i) {
            W q = V::bit_xor(V::multiply(m0, a[i]), c_keys[r + 1]), p = V::multiply(m1, c[i]);
            a[i] = V::bit_xor(V::high(p), b[i]);
            b[i] = p;
            c[i] = V::bit_xor(V::high(q), d[i]);
            d[i] = q;
          }
        }
      }
      ZO_UNROLL
      for (int i = 0; i < kChains; i += 2) {  // the last round, and even and odd calls put together
        uint32_t* out = words + lane + (i / 2) * kLanes;
        W q0 = V::multiply(m0, a[i]), q1 = V::multiply(m0, a[i + 1]);
        W p0 = V::multiply(m1, c[i]), p1 = V::multiply(m1, c[i + 1]);
        W w0 = V::bit_xor(V::interleave_high(p0, p1), V::interleave_low(b[i], b[i + 1]));
        W w2 = V::bit_xor(V::interleave_high(q0, q1), V::interleave_low(d[i], d[i + 1]));
        V::store(out, V::bit_xor(w0, a_keys[9]));
        V::store(out + 256, V::interleave_low(p0, p1));
        V::store(out + 512, V::kXor3 ? V::bit_xor(w2, c_keys[9]) : w2);
        V::store(out + 768, V::interleave_low(q0, q1));
      }
    }
  }
};

template <bool kPaired>
struct PhiloxTile<Scalar, kPaired> {
  static void run(uint32_t* words, const Key& key, uint64_t block, uint32_t stream, const char*, int) {
    const uint64_t seed = static_cast<uint64_t>(key.k1[0]) << 32 | key.k0[0];
    for (uint32_t lane = 0; lane < 256; ++lane) {
      Words call = philox(seed, block + lane, stream);
      for (int i = 0; i < 4; ++i) words[i * 256 + lane] = call.w[i];
    }
  }
};

}  // namespace ZO_ISA
}  // namespace zo
