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

// Round one group of each row of a pair and store it at out + at and out + at + 256. Both rows share the rounding words,
// the first takes the low halves.
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

// out = x + coefficient z over a row pair: x .. x + 511, which may be out.
template <class V, class T, bool kGaussian, bool kStochastic>
ZO_HD void add_term(float coefficient, const T* x, T* out, Rows rows, const uint32_t* words,
                    const uint32_t* rounding) {
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
        if constexpr (kGaussian) {
          row0[h] = V::fma(factor, z0.v[group + h], row0[h]);
          row1[h] = V::fma(factor, z1.v[group + h], row1[h]);
        } else {  // the product with +1 or -1 is exact: the sign bit is all it takes
          const U word = V::load(words + at + h * kLanes);
          row0[h] = V::add(row0[h], V::floats(V::xor_and(negative, V::shl_by(word, 31 - rows.bit), sign)));
          row1[h] = V::add(row1[h], V::floats(V::xor_and(negative, V::shl_by(word, 30 - rows.bit), sign)));
        }
      }
      store_rows<V, T, kStochastic>(out, at, row0, row1, rounding);
    }
  }
}

// A row pair with any number of terms and states. The sums wait in fp32 in the order of the words, so that a term is
// added to them as to an fp32 tensor.
template <class V, class T, bool kGaussian, bool kStochastic>
ZO_HD void add_terms(const AddNoise& args, const T* x, T* out, const float* const* states, int64_t place, Rows rows,
                     const uint32_t* words, const uint32_t* rounding) {
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
  for (int64_t k = 0; k < args.term_count; ++k) {
    add_term<V, float, kGaussian, false>(args.terms[k].coefficient, sums, sums, rows, words + k * kWordsPerTile,
                                         nullptr);
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
  const bool one_term = x && !args.keep && args.term_count == 1 && args.state_count == 0;
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
          Philox::run(words + k * kWordsPerTile, args.terms[k].key, noise_tile * 256, args.stream, next, stride);
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
                                                  words, random);
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
  Stats stats{tree_sum(sums), tree_sum(squares), 0, 0};
  float low = x[0], high = x[0];
  if (count == kTile) {
    alignas(64) float lows[256], highs[256];
    for (int i = 0; i < 256; ++i) lows[i] = highs[i] = x[i];
    for (int row = 256; row < kTile; row += 256) {
      for (int i = 0; i < 256; ++i) {
        lows[i] = x[i + row] < lows[i] ? x[i + row] : lows[i];
        highs[i] = x[i + row] > highs[i] ? x[i + row] : highs[i];
      }
    }
    for (int width = 128; width; width /= 2) {
      for (int i = 0; i < width; ++i) {
        lows[i] = lows[i + width] < lows[i] ? lows[i + width] : lows[i];
        highs[i] = highs[i + width] > highs[i] ? highs[i + width] : highs[i];
      }
    }
    low = lows[0];
    high = highs[0];
  } else {
    for (int64_t i = 1; i < count; ++i) {
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
    }
  }
  // Comparisons skip a NaN, but the sum of squares is NaN exactly if any value is. Adding 0 gives both zeros one sign.
  const bool nan = stats.square != stats.square;
  stats.low = nan ? stats.square : low + 0.0;
  stats.high = nan ? stats.square : high + 0.0;
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
