// The CPU kernels, written once over a machine (see csrc/noise.h) and compiled once per instruction set.
//
// A tile is done in two steps. `philox_tile` writes the words of its 256 Philox calls to a 4 KiB buffer that stays in
// the first-level cache; `row_pair` turns each pair of word rows into two rows of 256 normals (or signs), adds them to
// the two rows of x that stand at the same place, and rounds. The buffers keep the order of Memory's halves.
#pragma once

#include "api.h"
#include "memory.h"

namespace zo {
inline namespace ZO_ISA {

using cpu::AddNoise;
using cpu::Key;
using cpu::kTile;
using cpu::kUnit;
using cpu::kWordsPerTile;
using cpu::Span;
using cpu::Stats;
using cpu::Term;

// ---- Philox ---------------------------------------------------------------------------------------------------------

// Four rows of 256 words: those of the calls block .. block + 255, where block is a multiple of 256.
//
// Rounds 1 to 3 are partly the same for all calls of a tile, whose counters differ only in the low word: the first
// product is a ramp, and whatever is common to all is computed once.
template <class V, bool kPaired>
struct PhiloxTile {
  using W = typename V::W;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kChains = 4;  // two vectors of calls, each split into even and odd ones

  static void run(uint32_t* words, const Key& key, uint64_t block, uint32_t stream) {
    const uint32_t low = static_cast<uint32_t>(block), high = static_cast<uint32_t>(block >> 32);
    // Round 1: words 0 and 1 come from the stream and the high word of the counter.
    const uint64_t product1 = static_cast<uint64_t>(table::PHILOX_M1) * stream;
    const uint32_t c0 = static_cast<uint32_t>(product1 >> 32) ^ high ^ key.k0[0], c1 = static_cast<uint32_t>(product1);
    // Round 2: so does its first product.
    const uint64_t product2 = static_cast<uint64_t>(table::PHILOX_M0) * c0;
    const W key1_c2 = V::splat(key.k1[0]);
    const W key2_c0 = V::splat(c1 ^ key.k0[1]);
    const W key2_c2 = V::splat(static_cast<uint32_t>(product2 >> 32) ^ key.k1[1]);
    const W key3_c0 = V::splat(key.k0[2]);
    const W key3_c2 = V::splat(static_cast<uint32_t>(product2) ^ key.k1[2]);
    W key_c0[cpu::kRounds], key_c2[cpu::kRounds];
    for (int r = 3; r < cpu::kRounds; ++r) {
      key_c0[r] = V::splat(key.k0[r]);
      key_c2[r] = V::splat(key.k1[r]);
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
      W a[kChains], b[kChains], c[kChains], d[kChains];
      ZO_UNROLL
      for (int i = 0; i < kChains; ++i) {
        d[i] = V::add64(start, ramp[i]);                                    // round 1
        c[i] = V::bit_xor(V::high(d[i]), key1_c2);
        W p = V::multiply(m1, c[i]);                                        // round 2
        a[i] = V::bit_xor(V::high(p), key2_c0);
        c[i] = V::bit_xor(d[i], key2_c2);
        b[i] = p;
        W q = V::multiply(m0, a[i]);                                        // round 3
        p = V::multiply(m1, c[i]);
        a[i] = V::xor3(V::high(p), b[i], key3_c0);
        b[i] = p;
        c[i] = V::bit_xor(V::high(q), key3_c2);
        d[i] = q;
      }
      start = V::add64(start, advance);
      ZO_UNROLL
      for (int r = 3; r < cpu::kRounds - 1; ++r) {
        ZO_UNROLL
        for (int i = 0; i < kChains; ++i) {
          W q = V::multiply(m0, a[i]), p = V::multiply(m1, c[i]);
          a[i] = V::xor3(V::high(p), b[i], key_c0[r]);
          b[i] = p;
          c[i] = V::xor3(V::high(q), d[i], key_c2[r]);
          d[i] = q;
        }
      }
      ZO_UNROLL
      for (int i = 0; i < kChains; i += 2) {  // the last round, and even and odd calls put together
        uint32_t* out = words + lane + (i / 2) * kLanes;
        W q0 = V::multiply(m0, a[i]), q1 = V::multiply(m0, a[i + 1]);
        W p0 = V::multiply(m1, c[i]), p1 = V::multiply(m1, c[i + 1]);
        V::store(out, V::xor3(V::interleave_high(p0, p1), V::interleave_low(b[i], b[i + 1]), key_c0[9]));
        V::store(out + 256, V::interleave_low(p0, p1));
        V::store(out + 512, V::xor3(V::interleave_high(q0, q1), V::interleave_low(d[i], d[i + 1]), key_c2[9]));
        V::store(out + 768, V::interleave_low(q0, q1));
      }
    }
  }
};

template <bool kPaired>
struct PhiloxTile<Scalar, kPaired> {
  static void run(uint32_t* words, const Key& key, uint64_t block, uint32_t stream) {
    const uint64_t seed = static_cast<uint64_t>(key.k1[0]) << 32 | key.k0[0];
    for (uint32_t lane = 0; lane < 256; ++lane) {
      Words call = philox(seed, block + lane, stream);
      for (int i = 0; i < 4; ++i) words[i * 256 + lane] = call.w[i];
    }
  }
};

// ---- Several vectors at once ----------------------------------------------------------------------------------------

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

// ---- add_noise ------------------------------------------------------------------------------------------------------

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

// The elements at x .. x + 255 and x + 256 .. x + 511; states and rounding words at the same place.
template <class V, class T, bool kGaussian, bool kStochastic>
ZO_HD void row_pair(const AddNoise& args, const T* x, T* out, const float* const* states, int64_t place, Rows rows,
                    const uint32_t* words, const uint32_t* rounding) {
  using F = typename V::F;
  using U = typename V::U;
  using M = Memory<V, T>;
  constexpr int kHalves = M::kHalves, kLanes = V::kLanes, kPack = 4;  // vectors at once
  constexpr int kGroups = kPack / kHalves;
  using P = Pack<V, kPack>;
  const U sign = V::splat(0x80000000u);

  for (int lane = 0; lane < 256; lane += kPack * kLanes) {
    F acc0[kGroups][kHalves], acc1[kGroups][kHalves];
    for (int g = 0; g < kGroups; ++g) {
      if (x) {
        M::load(x + lane + g * kHalves * kLanes, acc0[g]);
        M::load(x + 256 + lane + g * kHalves * kLanes, acc1[g]);
      } else {
        for (int h = 0; h < kHalves; ++h) acc0[g][h] = acc1[g][h] = V::splat(-0.0f);
      }
      if (args.keep) {
        const F keep = V::splat(*args.keep);
        for (int h = 0; h < kHalves; ++h) {
          acc0[g][h] = V::mul(acc0[g][h], keep);
          acc1[g][h] = V::mul(acc1[g][h], keep);
        }
      }
    }
    for (int64_t k = 0; k < args.term_count; ++k) {
      const F coefficient = V::splat(args.terms[k].coefficient);
      const uint32_t* at = words + k * kWordsPerTile + rows.row * 256 + lane;
      if constexpr (kGaussian) {
        typename P::U radius, angle;
        typename P::F z0, z1;
        for (int i = 0; i < kPack; ++i) {
          radius.v[i] = V::load(at + i * kLanes);
          angle.v[i] = V::load(at + i * kLanes + 256);
        }
        box_muller<P>(radius, angle, z0, z1);
        for (int i = 0; i < kPack; ++i) {
          acc0[i / kHalves][i % kHalves] = V::fma(coefficient, z0.v[i], acc0[i / kHalves][i % kHalves]);
          acc1[i / kHalves][i % kHalves] = V::fma(coefficient, z1.v[i], acc1[i / kHalves][i % kHalves]);
        }
      } else {  // a product with +1 or -1 is exact: the sign bit is enough
        const U negative = V::bit_xor(V::bits(coefficient), sign);
        for (int i = 0; i < kPack; ++i) {
          U word = V::load(at + i * kLanes);
          F &a0 = acc0[i / kHalves][i % kHalves], &a1 = acc1[i / kHalves][i % kHalves];
          a0 = V::add(a0, V::floats(V::xor_and(negative, V::shl_by(word, 31 - rows.bit), sign)));
          a1 = V::add(a1, V::floats(V::xor_and(negative, V::shl_by(word, 30 - rows.bit), sign)));
        }
      }
    }
    for (int g = 0; g < kGroups; ++g) {
      const int at = lane + g * kHalves * kLanes;
      for (int64_t j = 0; j < args.state_count; ++j) {
        const F coefficient = V::splat(args.state_coefficients[j]);
        F state0[kHalves], state1[kHalves];
        load_halves(states[j] + place + at, state0);
        load_halves(states[j] + place + at + 256, state1);
        for (int h = 0; h < kHalves; ++h) {
          acc0[g][h] = V::fma(coefficient, state0[h], acc0[g][h]);
          acc1[g][h] = V::fma(coefficient, state1[h], acc1[g][h]);
        }
      }
      if constexpr (kStochastic) {
        U random0[kHalves], random1[kHalves];
        for (int h = 0; h < kHalves; ++h) {
          U word = V::load(rounding + at + h * kLanes);
          random0[h] = V::bit_and(word, V::splat(0xFFFFu));
          random1[h] = V::template shr<16>(word);
        }
        M::store(out + at, acc0[g], random0);
        M::store(out + 256 + at, acc1[g], random1);
      } else {
        M::store(out + at, acc0[g]);
        M::store(out + 256 + at, acc1[g]);
      }
    }
  }
}

template <class V, class T, bool kGaussian, bool kStochastic>
void add_noise_span(const AddNoise& args, const Span& span, uint32_t* words) {
  using Philox = PhiloxTile<V, Memory<V, T>::kHalves == 2>;
  alignas(64) uint32_t rounding[kWordsPerTile];
  const T* x = static_cast<const T*>(span.x);
  T* out = static_cast<T*>(span.out);
  uint64_t in_buffer = ~uint64_t{0};  // the tile whose words the buffers hold
  for (int64_t u = 0; u < span.units; ++u) {
    const uint64_t unit = span.first_unit + static_cast<uint64_t>(u);
    if constexpr (kStochastic) Philox::run(rounding, *args.rounding, unit * 256, table::STREAM_ROUNDING);
    for (int half = 0; half < 2; ++half) {
      const uint64_t tile = 2 * unit + half;
      const uint64_t noise_tile = kGaussian ? tile : tile / 32;
      if (noise_tile != in_buffer) {
        for (int64_t k = 0; k < args.term_count; ++k) {
          Philox::run(words + k * kWordsPerTile, args.terms[k].key, noise_tile * 256, args.stream);
        }
        in_buffer = noise_tile;
      }
      for (int pair = 0; pair < 2; ++pair) {
        const int64_t place = u * kUnit + half * kTile + pair * 512;
        row_pair<V, T, kGaussian, kStochastic>(args, x ? x + place : nullptr, out + place, span.states, place,
                                               rows_of<kGaussian>(tile, pair), words,
                                               rounding + (2 * half + pair) * 256);
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

// ---- Sums -----------------------------------------------------------------------------------------------------------

template <class V, class T>
void to_float(const void* values, float* out, int64_t count) {
  const T* p = static_cast<const T*>(values);
  int64_t i = 0;
  if constexpr (Memory<V, T>::kHalves == 1) {
    for (; i + V::kLanes <= count; i += V::kLanes) {
      typename V::F a[1];
      Memory<V, T>::load(p + i, a);
      V::store(out + i, a[0]);
    }
  }
  for (; i < count; ++i) {
    float a[1];
    Memory<Scalar, T>::load(p + i, a);
    out[i] = a[0];
  }
}

// The sum of 256 lanes by a halving tree.
ZO_HD double tree_sum(double (&lanes)[256]) {
  for (int width = 128; width; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// Products of fp32 values are exact in fp64.
template <class V>
double dot_tile(const float* x, const float* y) {
  alignas(64) double lanes[256];
  for (int i = 0; i < 256; ++i) {
    double sum = static_cast<double>(x[i]) * y[i];
    for (int row = 256; row < kTile; row += 256) sum += static_cast<double>(x[i + row]) * y[i + row];
    lanes[i] = sum;
  }
  return tree_sum(lanes);
}

template <class V>
Stats stats_tile(const float* x, int64_t count) {
  alignas(64) double sums[256], squares[256];
  for (int i = 0; i < 256; ++i) {
    double sum = x[i], square = static_cast<double>(x[i]) * x[i];
    for (int row = 256; row < kTile; row += 256) {
      const double value = x[i + row];
      sum += value;
      square += value * value;
    }
    sums[i] = sum;
    squares[i] = square;
  }
  // Sixteen running extremes, as one is a chain of dependent steps. The comparisons skip NaN, which the sum keeps.
  constexpr int kStrands = 16;
  alignas(64) float low[kStrands], high[kStrands];
  for (int i = 0; i < kStrands; ++i) low[i] = high[i] = x[0];
  bool nan = false;
  int64_t i = 0;
  for (; i + kStrands <= count; i += kStrands) {
    for (int j = 0; j < kStrands; ++j) {
      const float value = x[i + j];
      low[j] = value < low[j] ? value : low[j];
      high[j] = value > high[j] ? value : high[j];
      nan |= value != value;
    }
  }
  for (; i < count; ++i) {
    low[0] = x[i] < low[0] ? x[i] : low[0];
    high[0] = x[i] > high[0] ? x[i] : high[0];
    nan |= x[i] != x[i];
  }
  for (int j = 1; j < kStrands; ++j) {
    low[0] = low[j] < low[0] ? low[j] : low[0];
    high[0] = high[j] > high[0] ? high[j] : high[0];
  }
  // Adding 0 makes -0 and 0, which compare equal, one result.
  Stats stats{tree_sum(sums), tree_sum(squares), low[0] + 0.0f, high[0] + 0.0f};
  if (nan) stats.low = stats.high = static_cast<double>(bits_float(0x7FC00000));
  return stats;
}

template <class V>
constexpr cpu::Kernels make_kernels(const char* name) {
  return {name,
          {add_noise<V, float>, add_noise<V, BFloat16>, add_noise<V, Float16>},
          {to_float<V, float>, to_float<V, BFloat16>, to_float<V, Float16>},
          dot_tile<V>,
          stats_tile<V>};
}

}  // namespace ZO_ISA
}  // namespace zo
