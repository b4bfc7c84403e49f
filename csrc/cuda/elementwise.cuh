// The bodies of add_noise and noise_fill: what one thread does with one unit of work.
//
// Elements are counted in rows of 256 that start at multiples of 256 of the arena index, as the noise stream lays them
// out: one Philox call serves one lane (column) of several rows. A thread takes 16 bytes of neighbouring lanes in each
// of kRows rows, so every access is a full vector and no value crosses threads. A unit is what shares Philox calls;
// the first and the last of a range may be cut, and a range may start at any address: those go element by element.
//
// All of this is host code too. The kernels only choose (unit, thread); tests do the same in a loop.
#pragma once

#include "arguments.h"
#include "memory.cuh"

namespace zo::cuda {

// kTerms: this many noise terms and nothing else (signs: at most 1); 0: any number, decay and states.
// kFill: write the noise itself, as one term.
template <class T, Noise noise, bool stochastic, int terms, bool fill = false>
struct Config {
  using Type = T;
  static constexpr bool kGaussian = noise == Noise::kGaussian;
  static constexpr bool kStochastic = stochastic;
  static constexpr int kTerms = terms;
  static constexpr bool kFill = fill;

  static constexpr int kLanes = 4 * T::kPerWord;          // of one thread
  static constexpr int kThreads = table::LANES / kLanes;  // that share a row
  // Rows in flight: 32 fp32 accumulators, or the 8 rows that one call of rounding bits serves.
  static constexpr int kRows = stochastic || T::kPerWord == 1 || !kGaussian ? 8 : 4;
  static constexpr int kUnitRows = kGaussian ? kRows : 32;  // one word of signs is 32 rows
  static constexpr int64_t kUnit = kUnitRows * table::LANES;
  // Lanes worked on together: few, so that few words are in flight; with a run-time number of terms 32 sums at a time.
  static constexpr int kChunk = terms == 0 ? 32 / kRows : T::kPerWord;
};

// One range of elements whose Philox block numbers share their upper 32 bits, in units.
template <class C>
struct Range {
  static constexpr int kWindowBits = 34;  // the smallest index step at which an upper half changes: gaussian, 2^32 x 4

  uint32_t units;
  uint32_t whole_first, whole_end;  // units that vectors can do: not cut, and 16-byte accesses aligned
  uint32_t first_row;               // arena row of unit 0, modulo 2^32
  uint32_t block_high;              // of the noise
  uint32_t rounding_high;
  int64_t skew;  // elements of unit 0 that lie before the range

  explicit Range(const AddNoise& p) {
    skew = static_cast<int64_t>(p.offset & (C::kUnit - 1));
    first_row = static_cast<uint32_t>((p.offset - skew) >> 8);
    units = static_cast<uint32_t>((skew + p.count + C::kUnit - 1) / C::kUnit);
    block_high = static_cast<uint32_t>(
        p.offset >> (32 + (C::kGaussian ? kGaussianLog2Parts : kRademacherLog2Parts)));
    rounding_high = static_cast<uint32_t>(p.offset >> (32 + kRoundingLog2Parts));
    // x at lane 0 of row 0 would stand at x - skew elements.
    uint64_t back = static_cast<uint64_t>(skew) * sizeof(typename C::Type::Bits);
    uint64_t addresses = (reinterpret_cast<uint64_t>(p.out) - back) | (reinterpret_cast<uint64_t>(p.x) - back);
    uint64_t back32 = static_cast<uint64_t>(skew) * sizeof(float);
    for (int j = 0; j < p.state_count; ++j) addresses |= reinterpret_cast<uint64_t>(p.states[j]) - back32;
    bool aligned = addresses % sizeof(Vector) == 0;
    whole_first = aligned && skew > 0 ? 1 : 0;
    whole_end = aligned ? static_cast<uint32_t>((skew + p.count) / C::kUnit) : 0;
    if (whole_end < whole_first) whole_end = whole_first;
  }

  // The units that are done element by element, numbered from 0.
  ZO_HD uint32_t cut_units() const { return units - (whole_end - whole_first); }
  ZO_HD uint32_t cut_unit(uint32_t i) const { return i < whole_first ? i : i + (whole_end - whole_first); }
};

// Cuts the arguments where the upper half of a block number changes, and calls run(part, range) for each part.
template <class C, class Run>
void for_ranges(AddNoise p, const Run& run) {
  using Bits = typename C::Type::Bits;
  constexpr uint64_t kWindow = uint64_t{1} << Range<C>::kWindowBits;
  while (p.count > 0) {
    AddNoise part = p;
    int64_t room = static_cast<int64_t>(kWindow - p.offset % kWindow);
    if (part.count > room) part.count = room;
    run(part, Range<C>(part));
    p.x = static_cast<const Bits*>(p.x) + part.count;
    p.out = static_cast<Bits*>(p.out) + part.count;
    for (int s = 0; s < p.state_count; ++s) p.states[s] += part.count;
    p.offset += static_cast<uint64_t>(part.count);
    p.count -= part.count;
  }
}

template <class C>
ZO_HD uint32_t stream_of(const AddNoise& p, int k) {
  return C::kFill ? p.stream : static_cast<uint32_t>(p.streams[k]);
}

// What stays the same for all units of a thread.
template <class C>
struct Shared {
  Schedule noise[C::kTerms > 0 ? C::kTerms : 1];
  float coeff[C::kTerms > 0 ? C::kTerms : 1];
  Schedule rounding;

  ZO_HD Shared(const AddNoise& p, const Range<C>& range) {
    ZO_UNROLL
    for (int k = 0; k < C::kTerms; ++k) {
      noise[k] = schedule(static_cast<uint64_t>(p.seeds[k]), range.block_high, stream_of<C>(p, k));
      hold(noise[k]);
      coeff[k] = C::kFill ? 1.0f : p.coeffs[k];
    }
    if constexpr (C::kStochastic) {
      rounding = schedule(static_cast<uint64_t>(*p.rounding_seed), range.rounding_high, table::STREAM_ROUNDING);
    }
  }
};

// The low half of the block number of `row` (modulo 2^32) and `lane`, for calls that serve 2^log2_parts rows.
template <int log2_parts>
ZO_HD uint32_t block_low(uint32_t row, uint32_t lane) {
  return (row >> log2_parts << 8) + lane;
}

// +coefficient where bit `bit` of `word` is 1, -coefficient where it is 0.
ZO_HD float sign_term(uint32_t word, uint32_t bit, float coefficient) {
  return bits_float(float_bits(coefficient) ^ (~(word << (31 - bit)) & 0x80000000u));
}

// The signs of the next kRows rows for neighbouring lanes, in the low bits.
template <class C, int lanes>
struct Signs {
  uint32_t word[lanes];

  ZO_HD Signs(const Schedule& s, uint32_t row, uint32_t lane) {
    ZO_UNROLL
    for (int j = 0; j < lanes; ++j) {
      word[j] = pick(philox(s, block_low<kRademacherLog2Parts>(row, lane + j)), row >> 5 & 3) >> (row & 31);
    }
  }
  ZO_HD void next() {
    ZO_UNROLL
    for (int j = 0; j < lanes; ++j) word[j] >>= C::kRows;
  }
};

// acc += coefficient z for kChunk lanes from `lane` on and kRows rows from `row` on; `sign` as in Signs, if they are.
template <class C>
ZO_HD void add_term(float (&acc)[C::kRows][C::kChunk], const Schedule& s, const uint32_t* sign, float coefficient,
                    uint32_t row, uint32_t lane) {
  ZO_UNROLL
  for (int j = 0; j < C::kChunk; ++j) {
    if constexpr (C::kGaussian) {
      ZO_UNROLL
      for (int r = 0; r < C::kRows; r += 4) {
        float z[4];
        gaussian4(philox(s, block_low<kGaussianLog2Parts>(row + r, lane + j)), z);
        ZO_UNROLL
        for (int i = 0; i < 4; ++i) acc[r + i][j] = C::kFill ? z[i] : fma32(coefficient, z[i], acc[r + i][j]);
      }
    } else {
      ZO_UNROLL
      for (int r = 0; r < C::kRows; ++r) {
        float term = sign_term(sign[j], r, coefficient);
        acc[r][j] = C::kFill ? term : Scalar::add(acc[r][j], term);
      }
    }
  }
}

template <class C>
ZO_HD void add_states(float (&acc)[C::kRows][C::kChunk], const AddNoise& p, int64_t n) {
  for (int s = 0; s < p.state_count; ++s) {
    const float* state = s == 0 ? p.states[0] : p.states[1];
    float coefficient = p.coeffs[p.terms + s];
    ZO_UNROLL
    for (int r = 0; r < C::kRows; ++r) {
      const Vector* from = reinterpret_cast<const Vector*>(state + n + r * table::LANES);
      ZO_UNROLL
      for (int j = 0; j < C::kChunk; j += 4) {
        Vector v = from[j / 4];
        ZO_UNROLL
        for (int i = 0; i < 4; ++i) acc[r][j + i] = fma32(coefficient, bits_float(v.word[i]), acc[r][j + i]);
      }
    }
  }
}

// kRows whole rows: `row` is the arena row, `n` the element at this thread's first lane in it.
template <class C>
ZO_HD void whole_rows(const AddNoise& p, const Range<C>& range, const Shared<C>& shared,
                      const uint32_t* sign, uint32_t row, uint32_t lane, int64_t n) {
  using T = typename C::Type;
  using Bits = typename T::Bits;
  constexpr int kStride = table::LANES / C::kLanes;  // vectors in a row
  const Vector* from = reinterpret_cast<const Vector*>(static_cast<const Bits*>(p.x) + n);
  Vector* to = reinterpret_cast<Vector*>(static_cast<Bits*>(p.out) + n);

  Vector data[C::kRows];
  if constexpr (!C::kFill) {
    ZO_UNROLL
    for (int r = 0; r < C::kRows; ++r) data[r] = from[r * kStride];
  }
  ZO_UNROLL
  for (int j0 = 0; j0 < C::kLanes; j0 += C::kChunk) {
    float acc[C::kRows][C::kChunk];
    if constexpr (!C::kFill) {
      ZO_UNROLL
      for (int r = 0; r < C::kRows; ++r) {
        ZO_UNROLL
        for (int j = 0; j < C::kChunk; j += T::kPerWord) T::unpack(data[r].word[(j0 + j) / T::kPerWord], &acc[r][j]);
      }
    }
    if constexpr (C::kTerms > 0) {
      ZO_UNROLL
      for (int k = 0; k < C::kTerms; ++k) {
        add_term<C>(acc, shared.noise[k], sign + j0, shared.coeff[k], row, lane + j0);
      }
    } else {
      if (p.keep != nullptr) {
        float keep = *p.keep;
        ZO_UNROLL
        for (int r = 0; r < C::kRows; ++r) {
          ZO_UNROLL
          for (int j = 0; j < C::kChunk; ++j) acc[r][j] = Scalar::mul(acc[r][j], keep);
        }
      }
      for (int k = 0; k < p.terms; ++k) {
        Schedule s = schedule(static_cast<uint64_t>(p.seeds[k]), range.block_high, stream_of<C>(p, k));
        if constexpr (C::kGaussian) {
          add_term<C>(acc, s, nullptr, p.coeffs[k], row, lane + j0);
        } else {
          Signs<C, C::kChunk> own(s, row, lane + j0);
          add_term<C>(acc, s, own.word, p.coeffs[k], row, lane + j0);
        }
      }
      add_states<C>(acc, p, n + j0);
    }
    Words random[C::kChunk];
    if constexpr (C::kStochastic) {
      T::template quiet<C::kRows * C::kChunk>(&acc[0][0]);
      ZO_UNROLL
      for (int j = 0; j < C::kChunk; ++j) {
        random[j] = philox(shared.rounding, block_low<kRoundingLog2Parts>(row, lane + j0 + j));
      }
    }
    ZO_UNROLL
    for (int r = 0; r < C::kRows; ++r) {
      ZO_UNROLL
      for (int j = 0; j < C::kChunk; j += T::kPerWord) {
        uint32_t& word = data[r].word[(j0 + j) / T::kPerWord];
        if constexpr (C::kStochastic) {
          uint32_t bits[2] = {rounding16(random[j], r), rounding16(random[j + 1], r)};
          word = T::pack_stochastic(&acc[r][j], bits);
        } else {
          word = T::pack(&acc[r][j]);
        }
      }
    }
  }
  ZO_UNROLL
  for (int r = 0; r < C::kRows; ++r) to[r * kStride] = data[r];
}

// Four rows of one lane, element by element: `n` is the first row's element, which may lie outside of the range.
template <class C>
ZO_HD void four_elements(const AddNoise& p, int64_t n) {
  using T = typename C::Type;
  constexpr int kLog2Parts = C::kGaussian ? kGaussianLog2Parts : kRademacherLog2Parts;
  uint64_t index = p.offset + static_cast<uint64_t>(n);
  bool inside[4];
  float acc[4];
  ZO_UNROLL
  for (int r = 0; r < 4; ++r) {
    int64_t m = n + r * table::LANES;
    inside[r] = m >= 0 && m < p.count;
    acc[r] = !C::kFill && inside[r] ? load_one<T>(p.x, m) : 0.0f;
    if (p.keep != nullptr) acc[r] = Scalar::mul(acc[r], *p.keep);
  }
  Place at = place<kLog2Parts>(index);
  for (int k = 0; k < p.terms; ++k) {
    Words words = philox(static_cast<uint64_t>(p.seeds[k]), at.block, stream_of<C>(p, k));
    float coefficient = C::kFill ? 1.0f : p.coeffs[k];
    if constexpr (C::kGaussian) {
      float z[4];
      gaussian4(words, z);
      ZO_UNROLL
      for (int r = 0; r < 4; ++r) acc[r] = C::kFill ? z[r] : fma32(coefficient, z[r], acc[r]);
    } else {
      uint32_t word = pick(words, at.part >> 5);
      ZO_UNROLL
      for (int r = 0; r < 4; ++r) {
        float term = sign_term(word, (at.part & 31) + r, coefficient);
        acc[r] = C::kFill ? term : Scalar::add(acc[r], term);
      }
    }
  }
  for (int s = 0; s < p.state_count; ++s) {
    const float* state = s == 0 ? p.states[0] : p.states[1];
    float coefficient = p.coeffs[p.terms + s];
    ZO_UNROLL
    for (int r = 0; r < 4; ++r) {
      if (inside[r]) acc[r] = fma32(coefficient, state[n + r * table::LANES], acc[r]);
    }
  }
  Words random{};
  Place rounding = place<kRoundingLog2Parts>(index);
  if constexpr (C::kStochastic) {
    random = philox(static_cast<uint64_t>(*p.rounding_seed), rounding.block, table::STREAM_ROUNDING);
  }
  ZO_UNROLL
  for (int r = 0; r < 4; ++r) {
    if (!inside[r]) continue;
    float value[2] = {acc[r], 0.0f};
    uint32_t word;
    if constexpr (C::kStochastic) {
      uint32_t part = rounding.part + r;
      uint32_t bits[2] = {pick(random, part >> 1) >> (16 * (part & 1)) & 0xFFFF, 0};
      T::template quiet<2>(value);
      word = T::pack_stochastic(value, bits);
    } else {
      word = T::pack(value);
    }
    store_one<T>(p.out, n + r * table::LANES, word);
  }
}

// The share of thread 0 .. kThreads - 1 in one whole unit.
template <class C>
ZO_HD void whole_unit(const AddNoise& p, const Range<C>& range, const Shared<C>& shared, uint32_t unit,
                      uint32_t thread) {
  uint32_t row = range.first_row + unit * C::kUnitRows, lane = thread * C::kLanes;
  int64_t n = static_cast<int64_t>(lane) - range.skew + static_cast<int64_t>(unit) * C::kUnit;
  if constexpr (C::kGaussian || C::kTerms == 0) {
    for (int r = 0; r < C::kUnitRows; r += C::kRows) {
      whole_rows<C>(p, range, shared, nullptr, row + r, lane, n + r * table::LANES);
    }
  } else {
    Signs<C, C::kLanes> sign(shared.noise[0], row, lane);
#pragma unroll 1
    for (int r = 0; r < C::kUnitRows; r += C::kRows) {
      whole_rows<C>(p, range, shared, sign.word, row + r, lane, n + r * table::LANES);
      sign.next();
    }
  }
}

// One lane, 0 .. 255, of one unit that vectors cannot do.
template <class C>
ZO_HD void cut_unit(const AddNoise& p, const Range<C>& range, uint32_t unit, uint32_t lane) {
  int64_t start = static_cast<int64_t>(unit) * C::kUnit - range.skew;
#pragma unroll 1
  for (int r = 0; r < C::kUnitRows; r += 4) four_elements<C>(p, start + r * table::LANES + lane);
}

}  // namespace zo::cuda
