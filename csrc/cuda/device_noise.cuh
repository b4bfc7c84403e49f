// The noise stream as CUDA threads want it: the part of Philox that a whole launch shares is computed once, and 16-bit
// floats move in pairs. Everything is host code too, so that a test can run the kernels' bodies without a GPU.
#pragma once

#define ZO_ISA device
#include "../noise.h"

namespace zo::cuda {

// Philox4x32-10 for the calls whose block numbers share their upper 32 bits. Then only the first counter word varies:
// half of round 1, a quarter of round 2 and one word of round 3 are the same for all of them and are folded into the
// keys, which saves 3 of 40 instructions a call beside the key schedule itself.
struct Schedule {
  uint32_t word[19];
};

ZO_HD Schedule schedule(uint64_t seed, uint32_t block_high, uint32_t stream) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint64_t product1 = static_cast<uint64_t>(table::PHILOX_M1) * stream;
  uint32_t c0 = static_cast<uint32_t>(product1 >> 32) ^ block_high ^ k0;  // after round 1
  uint32_t c1 = static_cast<uint32_t>(product1);
  uint64_t product2 = static_cast<uint64_t>(table::PHILOX_M0) * c0;
  Schedule s;
  s.word[0] = k1;
  s.word[1] = c1 ^ (k0 + table::PHILOX_W0);
  s.word[2] = static_cast<uint32_t>(product2 >> 32) ^ (k1 + table::PHILOX_W1);
  s.word[3] = k0 + 2 * table::PHILOX_W0;
  s.word[4] = static_cast<uint32_t>(product2) ^ (k1 + 2 * table::PHILOX_W1);
  ZO_UNROLL
  for (uint32_t round = 3; round < table::PHILOX_ROUNDS; ++round) {
    s.word[2 * round - 1] = k0 + round * table::PHILOX_W0;
    s.word[2 * round] = k1 + round * table::PHILOX_W1;
  }
  return s;
}

// Keeps the schedule in registers: the compiler would rather add up the keys again for every unit, one instruction each
// for a word that is used a few times. Every thread of the warp must call it, with the same schedule.
ZO_HD void hold(Schedule& s) {
#if defined(__CUDA_ARCH__)
  ZO_UNROLL
  for (int i = 0; i < 19; ++i) s.word[i] = __shfl_sync(0xFFFFFFFFu, s.word[i], 0);
#else
  static_cast<void>(s);
#endif
}

// One 64-bit product is one instruction; its halves taken apart would be two.
ZO_HD uint64_t wide(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }
ZO_HD uint32_t high(uint64_t a) { return static_cast<uint32_t>(a >> 32); }
ZO_HD uint32_t low(uint64_t a) { return static_cast<uint32_t>(a); }

using zo::philox;  // the overload for any block

ZO_HD Words philox(const Schedule& s, uint32_t block_low) {
  uint64_t p0 = wide(table::PHILOX_M0, block_low);
  uint64_t p1 = wide(table::PHILOX_M1, high(p0) ^ s.word[0]);
  uint32_t c0 = high(p1) ^ s.word[1], c1 = low(p1), c2 = low(p0) ^ s.word[2];
  p0 = wide(table::PHILOX_M0, c0);
  p1 = wide(table::PHILOX_M1, c2);
  c0 = high(p1) ^ c1 ^ s.word[3], c1 = low(p1), c2 = high(p0) ^ s.word[4];
  uint32_t c3 = low(p0);
  ZO_UNROLL
  for (uint32_t round = 3; round < table::PHILOX_ROUNDS; ++round) {
    p0 = wide(table::PHILOX_M0, c0);
    p1 = wide(table::PHILOX_M1, c2);
    c0 = high(p1) ^ c1 ^ s.word[2 * round - 1], c1 = low(p1);
    c2 = high(p0) ^ c3 ^ s.word[2 * round], c3 = low(p0);
  }
  return {{c0, c1, c2, c3}};
}

// words.w[i] without an array in memory.
ZO_HD uint32_t pick(const Words& words, uint32_t i) {
  uint32_t a = i & 1 ? words.w[1] : words.w[0], b = i & 1 ? words.w[3] : words.w[2];
  return i & 2 ? b : a;
}

}  // namespace zo::cuda
