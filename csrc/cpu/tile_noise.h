// The numbers of whole tiles in memory order, for kernels that use them more than once or beside fp32 states.
#pragma once

#include "api.h"
#include "memory.h"
#include "pack.h"
#include "philox.h"

namespace zo {
inline namespace ZO_ISA {

using cpu::kTile;
using cpu::kWordsPerTile;
using cpu::Noise;

// Memory that the next step will read, of which `stride` bytes are fetched for each of 256 calls.
struct Ahead {
  const char* place;
  int stride;
};

// Two rows of 256 words to two rows of normals.
template <class V>
ZO_HD void normals(const uint32_t* words, float* z, Ahead ahead) {
  constexpr int kLanes = V::kLanes, kPack = kLanes > 1 ? 4 : 1;
  using P = Pack<V, kPack>;
  ZO_INDEPENDENT
  for (int lane = 0; lane < 256; lane += kPack * kLanes) {
    if constexpr (kLanes > 1) {
      for (int byte = 0; byte < kPack * kLanes * ahead.stride; byte += 64) {
        __builtin_prefetch(ahead.place + lane * ahead.stride + byte, 1);
      }
    }
    typename P::U radius, angle;
    typename P::F z0, z1;
    ZO_UNROLL
    for (int i = 0; i < kPack; ++i) {
      radius.v[i] = V::load(words + lane + i * kLanes);
      angle.v[i] = V::load(words + lane + i * kLanes + 256);
    }
    box_muller<P>(radius, angle, z0, z1);
    ZO_UNROLL
    for (int i = 0; i < kPack; ++i) {
      V::store(z + lane + i * kLanes, z0.v[i]);
      V::store(z + lane + i * kLanes + 256, z1.v[i]);
    }
  }
}

// 256 signs from one bit of each word of a row.
template <class V>
ZO_HD void signs(const uint32_t* words, int bit, float* z) {
  const typename V::U one = V::bits(V::splat(-1.0f)), sign = V::splat(0x80000000u);
  for (int lane = 0; lane < 256; lane += V::kLanes) {
    V::store(z + lane, V::floats(V::xor_and(one, V::shl_by(V::load(words + lane), 31 - bit), sign)));
  }
}

template <class V>
class TileNoise {
 public:
  static constexpr int kSize = kTile;

  // `words` is of kWordsPerTile for each term.
  TileNoise(const Noise& noise, uint32_t* words) : noise_(noise), words_(words) {}

  // Term k's numbers of the gaussian tile `tile` to z + k * stride. Meanwhile two pieces of memory are fetched.
  __attribute__((noinline)) void draw(uint64_t tile, float* z, int64_t stride, Ahead first = {nullptr, 0},
                                      Ahead second = {nullptr, 0}) {
    for (int64_t k = 0; k < noise_.count; ++k) draw_term(k, tile, z + k * stride, first, second);
    held_ = tile / 32;
  }

 private:
  using Philox = PhiloxTile<V, false>;

  ZO_HD void draw_term(int64_t k, uint64_t tile, float* z, Ahead first, Ahead second) {
    const cpu::Term& term = noise_.terms[k];
    if (k > 0) first.stride = second.stride = 0;
    if (noise_.gaussian) {
      Philox::run(words_, term.key, tile * 256, term.stream, first.place, first.stride);
      normals<V>(words_, z, second);
      normals<V>(words_ + 512, z + 512, {nullptr, 0});
      return;
    }
    uint32_t* words = words_ + k * kWordsPerTile;
    if (tile / 32 != held_) Philox::run(words, term.key, tile / 32 * 256, term.stream, nullptr, 0);
    for (int row = 0; row < 4; ++row) {
      const int part = static_cast<int>(tile & 31) * 4 + row;  // of the 128 in a rademacher tile
      signs<V>(words + part / 32 * 256, part % 32, z + row * 256);
    }
  }

  const Noise& noise_;
  uint32_t* words_;
  uint64_t held_ = ~uint64_t{0};  // the rademacher tile whose words the buffers hold
};

// The random bits of a row of 256 elements, of which two share a row of words.
template <class V>
ZO_HD typename V::U rounding_bits(const uint32_t* words, int row, int lane) {
  const typename V::U word = V::load(words + row / 2 * 256 + lane);
  return row & 1 ? V::template shr<16>(word) : V::bit_and(word, V::splat(0xFFFFu));
}

// One vector of x, stored to nearest or, if T is of 16 bits and `stochastic`, with the bits of `row` at `lane`.
template <class V, class T>
ZO_HD void store_rounded(T* out, typename V::F value, bool stochastic, const uint32_t* words, int row, int lane) {
  if constexpr (sizeof(T) == 2) {
    if (stochastic) return InOrder<V, T>::store(out, value, rounding_bits<V>(words, row, lane));
  }
  InOrder<V, T>::store(out, value);
}

}  // namespace ZO_ISA
}  // namespace zo
