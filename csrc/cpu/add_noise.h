// add_noise over whole units.
//
// A tile is done in two steps. `PhiloxTile` writes the words of its 256 Philox calls to a 4 KiB buffer that stays in
// the first-level cache; `add_term` turns each pair of word rows into two rows of 256 normals (or signs), adds them to
// the two rows of x that stand at the same place, and rounds. The buffers keep the order of Memory's halves.
#pragma once

#include "api.h"
#include "memory.h"
#include "pack.h"
#include "philox.h"

namespace zo {
inline namespace ZO_ISA {

using cpu::AddNoise;
using cpu::kDiag;
using cpu::kMask;
using cpu::kPlain;
using cpu::kScale;
using cpu::kTile;
using cpu::kUnit;
using cpu::kWordsPerTile;
using cpu::Span;
using cpu::Transform;

// Where the noise of a row pair stands in a term's buffer: the two rows of words that give it, or the row and the bits.
struct Rows {
  int row;  // gaussian: of the radius words, the angle words follow; rademacher: of the words
  int bit;  // rademacher: of the first row of the pair, the second takes the next bit
};

template <bool kGaussian>
ZO_HD Rows rows_of(uint64_t tile, int pair) {
  const int part = static_cast<int>(tile & 31) * 4 + 2 * pair;  // of the 128 in a rademacher tile
  return kGaussian ? Rows{2 * pair, 0} : Rows{part / 32, part % 32};
}

// Round one group of each row of a pair and store it at out + at and out + at + 256. Both rows share the rounding
// words, the first takes the low halves.
template <class V, class T, bool kStochastic, int kHalves>
ZO_HD void store_rows(T* out, int at, const typename V::F (&row0)[kHalves], const typename V::F (&row1)[kHalves],
                      const uint32_t* rounding) {
  using M = Memory<V, T>;
  if constexpr (kStochastic) {
    typename V::U random0[kHalves], random1[kHalves];
    for (int h = 0; h < kHalves; ++h) {
      const typename V::U word = V::load(rounding + at + h * V::kLanes);
      random0[h] = V::bit_and(word, V::splat(0xFFFFu));
      random1[h] = V::template shr<16>(word);
    }
    M::store(out + at, row0, random0);
    M::store(out + at + 256, row1, random1);
  } else {
    M::store(out + at, row0);
    M::store(out + at + 256, row1);
  }
}

// T(z), where the operand is one factor, or the divisors of a row pair in the order of the halves.
template <class V, Transform kTransform>
ZO_HD typename V::F transformed(typename V::F z, const float* operand, int at) {
  if constexpr (kTransform == kScale) return V::mul(V::splat(*operand), z);
  if constexpr (kTransform == kDiag) return V::div(z, V::load(operand + at));
  return z;
}

// out = x + coefficient T(z) over a row pair: x .. x + 511, which may be out.
template <class V, class T, bool kGaussian, bool kStochastic, Transform kTransform = kPlain>
ZO_HD void add_term(float coefficient, const T* x, T* out, Rows rows, const uint32_t* words, const uint32_t* rounding,
                    const float* operand = nullptr) {
  using F = typename V::F;
  using U = typename V::U;
  using M = Memory<V, T>;
  constexpr int kHalves = M::kHalves, kLanes = V::kLanes;
  constexpr int kPack = kLanes > 1 ? 4 : 1;  // vectors at once; single elements are left to the compiler
  using P = Pack<V, kPack>;
  const F factor = V::splat(coefficient);
  const U sign = V::splat(0x80000000u);
  const U negative = V::bit_xor(V::bits(factor), sign);
  words += rows.row * 256;

  ZO_INDEPENDENT
  for (int lane = 0; lane < 256; lane += kPack * kLanes) {
    typename P::F z0, z1;
    if constexpr (kGaussian) {
      typename P::U radius, angle;
      ZO_UNROLL
      for (int i = 0; i < kPack; ++i) {
        radius.v[i] = V::load(words + lane + i * kLanes);
        angle.v[i] = V::load(words + lane + i * kLanes + 256);
      }
      box_muller<P>(radius, angle, z0, z1);
    }
    ZO_UNROLL
    for (int group = 0; group < kPack; group += kHalves) {
      const int at = lane + group * kLanes;
      F row0[kHalves], row1[kHalves];
      M::load(x + at, row0);
      M::load(x + at + 256, row1);
      ZO_UNROLL
      for (int h = 0; h < kHalves; ++h) {
        const int place = at + h * kLanes;
        if constexpr (kGaussian) {
          row0[h] = V::fma(factor, transformed<V, kTransform>(z0.v[group + h], operand, place), row0[h]);
          row1[h] = V::fma(factor, transformed<V, kTransform>(z1.v[group + h], operand, place + 256), row1[h]);
        } else if constexpr (kTransform != kPlain) {
          const U word = V::load(words + place), one = V::bits(V::splat(-1.0f));
          const F sign0 = V::floats(V::xor_and(one, V::shl_by(word, 31 - rows.bit), sign));
          const F sign1 = V::floats(V::xor_and(one, V::shl_by(word, 30 - rows.bit), sign));
          row0[h] = V::fma(factor, transformed<V, kTransform>(sign0, operand, place), row0[h]);
          row1[h] = V::fma(factor, transformed<V, kTransform>(sign1, operand, place + 256), row1[h]);
        } else {  // the product with +1 or -1 is exact: the sign bit is all it takes
          const U word = V::load(words + place);
          row0[h] = V::add(row0[h], V::floats(V::xor_and(negative, V::shl_by(word, 31 - rows.bit), sign)));
          row1[h] = V::add(row1[h], V::floats(V::xor_and(negative, V::shl_by(word, 30 - rows.bit), sign)));
        }
      }
      store_rows<V, T, kStochastic>(out, at, row0, row1, rounding);
    }
  }
}

// What the transform needs at a row pair: the factor of the tile, the bits or the values of the 512 elements.
ZO_HD const void* operand_at(const Span& span, Transform transform, int64_t tile, int64_t place) {
  if (transform == kScale) return static_cast<const float*>(span.operand) + tile;
  if (transform == kMask) return static_cast<const uint8_t*>(span.operand) + place / 8;
  if (transform == kDiag) return static_cast<const float*>(span.operand) + place;
  return nullptr;
}

// Add all terms to the sums of a row pair, which wait in fp32 in the order of the words.
template <class V, bool kGaussian, Transform kTransform>
__attribute__((noinline)) void add_all_terms(const AddNoise& args, float* sums, Rows rows, const uint32_t* words,
                                             const float* operand) {
  for (int64_t k = 0; k < args.term_count; ++k) {
    add_term<V, float, kGaussian, false, kTransform>(args.terms[k].coefficient, sums, sums, rows,
                                                     words + k * kWordsPerTile, nullptr, operand);
  }
}

// Elements whose bit is 0 get their own value back.
template <class V, class T>
ZO_HD void restore_masked(float* sums, const T* x, const uint8_t* bits) {
  using M = Memory<V, T>;
  constexpr int kHalves = M::kHalves, kLanes = V::kLanes;
  for (int at = 0; at < 512; at += kHalves * kLanes) {
    typename V::F own[kHalves];
    M::load(x + at, own);
    const uint32_t word = bits_at<kHalves * kLanes>(bits, at);
    float* sum = sums + at;
    V::store(sum, V::template pick<kHalves, 0>(word, own[0], V::load(sum)));
    if constexpr (kHalves == 2) {
      V::store(sum + kLanes, V::template pick<2, 1>(word, own[1], V::load(sum + kLanes)));
    }
  }
}

// A row pair with any number of terms, transformed or not, and states.
template <class V, class T, bool kGaussian, bool kStochastic>
ZO_HD void add_terms(const AddNoise& args, const T* x, T* out, const float* const* states, int64_t place, Rows rows,
                     const uint32_t* words, const uint32_t* rounding, const void* operand) {
  using F = typename V::F;
  using M = Memory<V, T>;
  constexpr int kHalves = M::kHalves, kLanes = V::kLanes;
  alignas(64) float sums[512];
  for (int at = 0; at < 512; at += kHalves * kLanes) {
    F a[kHalves];
    for (int h = 0; h < kHalves; ++h) a[h] = V::splat(-0.0f);
    if (x) M::load(x + at, a);
    for (int h = 0; h < kHalves; ++h) {
      V::store(sums + at + h * kLanes, args.keep ? V::mul(a[h], V::splat(*args.keep)) : a[h]);
    }
  }
  if (args.transform == kDiag) {
    alignas(64) float roots[512];
    for (int at = 0; at < 512; at += kHalves * kLanes) {
      F values[kHalves];
      load_halves(static_cast<const float*>(operand) + at, values);
      for (int h = 0; h < kHalves; ++h) V::store(roots + at + h * kLanes, V::sqrt(values[h]));
    }
    add_all_terms<V, kGaussian, kDiag>(args, sums, rows, words, roots);
  } else if (args.transform == kScale) {
    add_all_terms<V, kGaussian, kScale>(args, sums, rows, words, static_cast<const float*>(operand));
  } else {
    add_all_terms<V, kGaussian, kPlain>(args, sums, rows, words, nullptr);
  }
  for (int64_t j = 0; j < args.state_count; ++j) {
    const F coefficient = V::splat(args.state_coefficients[j]);
    for (int at = 0; at < 512; at += kHalves * kLanes) {
      F state[kHalves];
      load_halves(states[j] + place + at, state);
      for (int h = 0; h < kHalves; ++h) {
        float* sum = sums + at + h * kLanes;
        V::store(sum, V::fma(coefficient, state[h], V::load(sum)));
      }
    }
  }
  if (args.transform == kMask) restore_masked<V>(sums, x, static_cast<const uint8_t*>(operand));
  for (int at = 0; at < 256; at += kHalves * kLanes) {
    F row0[kHalves], row1[kHalves];
    for (int h = 0; h < kHalves; ++h) {
      row0[h] = V::load(sums + at + h * kLanes);
      row1[h] = V::load(sums + at + h * kLanes + 256);
    }
    store_rows<V, T, kStochastic>(out, at, row0, row1, rounding);
  }
}

template <class V, class T, bool kGaussian, bool kStochastic>
void add_noise_span(const AddNoise& args, const Span& span, uint32_t* words) {
  using Philox = PhiloxTile<V, Memory<V, T>::kHalves == 2>;
  alignas(64) uint32_t rounding[kWordsPerTile];
  const T* x = static_cast<const T*>(span.x);
  T* out = static_cast<T*>(span.out);
  const bool one_term = x && !args.keep && args.term_count == 1 && args.state_count == 0 && args.transform == kPlain;
  uint64_t in_buffer = ~uint64_t{0};  // the tile whose words the buffers hold
  for (int64_t u = 0; u < span.units; ++u) {
    const uint64_t unit = span.first_unit + static_cast<uint64_t>(u);
    if constexpr (kStochastic) Philox::run(rounding, *args.rounding, unit * 256, table::STREAM_ROUNDING, nullptr, 0);
    for (int half = 0; half < 2; ++half) {
      const uint64_t tile = 2 * unit + half;
      const int64_t tile_place = u * kUnit + half * kTile;
      const uint64_t noise_tile = kGaussian ? tile : tile / 32;
      if (noise_tile != in_buffer) {
        const char* next = reinterpret_cast<const char*>((x ? x : out) + tile_place + kTile);
        for (int64_t k = 0; k < args.term_count; ++k) {
          const int stride = kGaussian && k == 0 ? kTile / 256 * static_cast<int>(sizeof(T)) : 0;
          const cpu::Term& term = args.terms[k];
          Philox::run(words + k * kWordsPerTile, term.key, noise_tile * 256, term.stream, next, stride);
        }
        in_buffer = noise_tile;
      }
      for (int pair = 0; pair < 2; ++pair) {
        const int64_t place = tile_place + pair * 512;
        const Rows rows = rows_of<kGaussian>(tile, pair);
        const uint32_t* random = rounding + (2 * half + pair) * 256;
        if (one_term) {
          add_term<V, T, kGaussian, kStochastic>(args.terms->coefficient, x + place, out + place, rows, words, random);
        } else {
          add_terms<V, T, kGaussian, kStochastic>(args, x ? x + place : nullptr, out + place, span.states, place, rows,
                                                  words, random,
                                                  operand_at(span, args.transform, 2 * u + half, place));
        }
      }
    }
  }
}

template <class V, class T>
void add_noise(const AddNoise& args, const Span& span, uint32_t* words) {
  constexpr bool k16Bit = sizeof(T) == 2;
  if (k16Bit && args.rounding) {
    args.gaussian ? add_noise_span<V, T, true, k16Bit>(args, span, words)
                  : add_noise_span<V, T, false, k16Bit>(args, span, words);
  } else {
    args.gaussian ? add_noise_span<V, T, true, false>(args, span, words)
                  : add_noise_span<V, T, false, false>(args, span, words);
  }
}

}  // namespace ZO_ISA
}  // namespace zo
