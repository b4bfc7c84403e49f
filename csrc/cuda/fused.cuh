// The bodies of the elementwise ops that do more with noise than add it: transformed noise, folds, update rules.
//
// A warp takes a unit: 8 rows of 256 lanes, which start at a multiple of 2048 of the arena index and share the calls of
// rounding bits. A thread takes four parts of it one after another, each 4 rows (one tile, so one Philox call) of 4
// neighbouring lanes: 16 elements with all their states in registers, states in accesses of 16 bytes, weights of 16 bits
// in accesses of 8. Units that a range cuts, and ranges at unsuitable addresses, go the same way lane by lane.
//
// What differs between the ops is an `Op` (fused_ops.cuh) that sees one element at a time. Noise, rounding and whether a
// sum of squares is wanted are branches that all threads take alike: more instances would only take longer to compile.
#pragma once

#include "fused_span.cuh"

namespace zo::cuda {

// One element on its way through an op.
struct Element {
  float acc;       // the weight, then its sum
  float state[3];  // old values, then new ones
  float sum;
  float other;
};

// The coefficients of one term: of the first and of the second set, where an op has two.
struct Coefficients {
  float first, second;
};

// The schedule of the term that comes next. With one term it is computed once a thread and never again.
struct Turn {
  Schedule schedule;
  int term = 0;

  ZO_HD Turn(const Fused& p, const Span& span) {
    if (p.terms == 0) return;
    load(p, span);
    hold(schedule);
  }
  ZO_HD void next(const Fused& p, const Span& span) {
    if (p.terms == 1) return;
    term = term + 1 == p.terms ? 0 : term + 1;
    load(p, span);
  }
  ZO_HD void load(const Fused& p, const Span& span) {
    schedule = zo::cuda::schedule(static_cast<uint64_t>(p.seeds[term]), span.noise_high,
                                  static_cast<uint32_t>(p.streams[term]));
  }
};

// z of a part's elements: [row][lane].
template <int lanes>
ZO_HD void part_noise(const Fused& p, const Schedule& s, const Spot& spot, float (&z)[kPartRows][lanes]) {
  ZO_UNROLL
  for (int j = 0; j < lanes; ++j) {
    if (p.noise == Noise::kGaussian) {
      float column[kPartRows];
      gaussian4(philox(s, (spot.row >> kGaussianLog2Parts << 8) + spot.lane + j), column);
      ZO_UNROLL
      for (int i = 0; i < kPartRows; ++i) z[i][j] = column[i];
    } else {
      Words words = philox(s, (spot.row >> kRademacherLog2Parts << 8) + spot.lane + j);
      uint32_t word = pick(words, spot.row >> 5 & 3) >> (spot.row & 31);
      ZO_UNROLL
      for (int i = 0; i < kPartRows; ++i) z[i][j] = word >> i & 1 ? 1.0f : -1.0f;
    }
  }
}

// The words of rounding bits that a part needs, for each of its lanes.
template <int lanes>
struct PartRandom {
  uint32_t low[lanes], high[lanes];  // rows 0 and 1, rows 2 and 3
};

// Row i of a part, rounded.
template <class T, int lanes>
ZO_HD Weights<T, lanes> round_row(const Fused& p, const PartRandom<lanes>& random, int i, const float* value) {
  Weights<T, lanes> data;
  ZO_UNROLL
  for (int w = 0; w < data.kWords; ++w) {
    if constexpr (T::kPerWord == 2) {
      float pair[2] = {value[2 * w], lanes == 1 ? 0.0f : value[2 * w + 1]};
      if (p.rounding_seed != nullptr) {
        const uint32_t* words = i < 2 ? random.low : random.high;
        uint32_t bits[2] = {words[2 * w] >> (16 * (i & 1)) & 0xFFFF,
                            lanes == 1 ? 0 : words[2 * w + 1] >> (16 * (i & 1)) & 0xFFFF};
        data.word[w] = T::pack_stochastic(pair, bits);
        continue;
      }
      data.word[w] = T::pack(pair);
    } else {
      data.word[w] = T::pack(value + w);
    }
  }
  return data;
}

// Takes the old weights where the mask's bit is 0; n: the first element's.
template <class T, int lanes>
ZO_HD void copy_masked(const Fused& p, int64_t n, const Weights<T, lanes>& before, Weights<T, lanes>& data) {
  int64_t first = p.first + n;
  uint32_t chosen = !(lanes == 1) || inside(p, n) ? p.bits[first >> 3] >> (first & 7) : 0;  // 4 bits share a byte
  ZO_UNROLL
  for (int w = 0; w < data.kWords; ++w) {
    uint32_t taken = 0u - (chosen >> (w * T::kPerWord) & 1);
    if constexpr (T::kPerWord == 2) taken = (taken & 0xFFFF) | (0u - (chosen >> (2 * w + 1) & 1)) << 16;
    data.word[w] = (data.word[w] & taken) | (before.word[w] & ~taken);
  }
}

// One part. `squares` gets the sum of squares of each lane's valid elements.
template <class Op, int lanes>
ZO_HD void fused_part(const Fused& p, const Span& span, const Op& op, Turn& turn, const Spot& spot,
                      const PartRandom<lanes>& random, double (&squares)[lanes]) {
  using T = typename Op::Type;
  Element e[kPartRows][lanes];
  Weights<T, lanes> before[kPartRows];
  if constexpr (Op::kWeights) {
    ZO_UNROLL
    for (int i = 0; i < kPartRows; ++i) before[i] = load_weights<T, lanes>(p, spot.n + i * table::LANES);
  }
  ZO_UNROLL
  for (int s = 0; s < Op::kStates; ++s) {
    const float* from = Op::kDiag ? p.diag : p.states[s];
    ZO_UNROLL
    for (int i = 0; i < kPartRows; ++i) {
      float value[lanes];
      load_floats<lanes>(p, from, spot.n + i * table::LANES, value);
      ZO_UNROLL
      for (int j = 0; j < lanes; ++j) e[i][j].state[s] = value[j];
    }
  }
  float keep = p.keep == nullptr ? 1.0f : *p.keep;  // times 1 changes no bit
  ZO_UNROLL
  for (int i = 0; i < kPartRows; ++i) {
    ZO_UNROLL
    for (int j = 0; j < lanes; ++j) {
      if constexpr (Op::kWeights) {
        float value[2];
        T::unpack(before[i].word[j / T::kPerWord], value);
        e[i][j].acc = Scalar::mul(value[j % T::kPerWord], keep);
      }
      op.begin(e[i][j]);
    }
  }
  float factor = 1.0f;
  if constexpr (Op::kScale) {
    int64_t tile = static_cast<int64_t>((p.offset + static_cast<uint64_t>(spot.n)) >> 10) -
                   static_cast<int64_t>(p.offset >> 10);
    if (lanes > 1 || (tile >= 0 && spot.n < p.count)) factor = p.scale[tile];
  }
  float z[kPartRows][lanes];
  for (int k = 0; k < p.terms; ++k) {
    part_noise(p, turn.schedule, spot, z);
    turn.next(p, span);
    Coefficients c = op.coefficients(p, k);
    ZO_UNROLL
    for (int i = 0; i < kPartRows; ++i) {
      ZO_UNROLL
      for (int j = 0; j < lanes; ++j) {
        if constexpr (Op::kScale) z[i][j] = Scalar::mul(factor, z[i][j]);
        op.term(c, k, z[i][j], e[i][j]);
      }
    }
  }
  ZO_UNROLL
  for (int i = 0; i < kPartRows; ++i) {
    ZO_UNROLL
    for (int j = 0; j < lanes; ++j) op.end(e[i][j]);
  }
  if constexpr (Op::kAgain) {
    for (int k = 0; k < p.terms; ++k) {
      if (p.terms > 1) {  // a single term's noise is still at hand
        part_noise(p, turn.schedule, spot, z);
        turn.next(p, span);
      }
      Coefficients c = op.coefficients(p, k);
      ZO_UNROLL
      for (int i = 0; i < kPartRows; ++i) {
        ZO_UNROLL
        for (int j = 0; j < lanes; ++j) op.again(c, z[i][j], e[i][j]);
      }
    }
  }
  if constexpr (Op::kAdds) {
    for (int a = 0; a < kMaxStates; ++a) {
      const float* from = a == 0 ? p.added[0] : p.added[1];
      if (from == nullptr) break;
      float coefficient = p.coeffs[p.terms + a];
      ZO_UNROLL
      for (int i = 0; i < kPartRows; ++i) {
        float value[lanes];
        load_floats<lanes>(p, from, spot.n + i * table::LANES, value);
        ZO_UNROLL
        for (int j = 0; j < lanes; ++j) e[i][j].acc = fma32(coefficient, value[j], e[i][j].acc);
      }
    }
  }
  if constexpr (!Op::kDiag) {
    ZO_UNROLL
    for (int s = 0; s < Op::kStates; ++s) {
      ZO_UNROLL
      for (int i = 0; i < kPartRows; ++i) {
        float value[lanes];
        ZO_UNROLL
        for (int j = 0; j < lanes; ++j) value[j] = e[i][j].state[s];
        store_floats<lanes>(p, p.states[s], spot.n + i * table::LANES, value);
      }
    }
  }
  if constexpr (Op::kWeights) {
    float value[kPartRows][lanes];
    ZO_UNROLL
    for (int i = 0; i < kPartRows; ++i) {
      ZO_UNROLL
      for (int j = 0; j < lanes; ++j) value[i][j] = e[i][j].acc;
    }
    if constexpr (T::kPerWord == 2) {
      if (p.rounding_seed != nullptr) T::template quiet<kPartRows * lanes>(&value[0][0]);
    }
    ZO_UNROLL
    for (int i = 0; i < kPartRows; ++i) {
      int64_t n = spot.n + i * table::LANES;
      Weights<T, lanes> data = round_row<T, lanes>(p, random, i, value[i]);
      if constexpr (Op::kCopies) copy_masked<T, lanes>(p, n, before[i], data);
      store_weights<T, lanes>(p, n, data);
    }
  }
  if constexpr (Op::kSquares) {
    if (p.squares == nullptr) return;
    int64_t start = spot.n - static_cast<int64_t>(spot.lane);  // of a tile of the state: so is the offset
    if (start < 0 || start >= p.count) return;
    int valid = p.valid[start >> 10];
    ZO_UNROLL
    for (int j = 0; j < lanes; ++j) {
      squares[j] = 0.0;
      ZO_UNROLL
      for (int i = 0; i < kPartRows; ++i) {
        int place = i * static_cast<int>(table::LANES) + static_cast<int>(spot.lane) + j;
        double value = place < valid && inside(p, spot.n + i * table::LANES + j) ? e[i][j].state[0] : 0.0f;
        squares[j] = fma64(value, value, squares[j]);
      }
    }
  }
}

// The share of thread 0 .. 31 of a warp in one unit. `squares`: of its two tiles, lanes 128 apart already added.
template <class Op, int lanes>
ZO_HD void fused_unit(const Fused& p, const Span& span, const Op& op, Turn& turn, uint32_t unit, uint32_t thread,
                      double (&squares)[2][kPartLanes]) {
  constexpr uint32_t kGroups = kPartLanes / lanes;  // that a thread's four lanes are taken in
  PartRandom<lanes> random{}, upper{};
  ZO_UNROLL
  for (int j = 0; j < kPartLanes; ++j) squares[0][j] = squares[1][j] = 0.0;
#pragma unroll 1
  for (uint32_t part = 0; part < 4 * kGroups; ++part) {
    const uint32_t tile = part & 1, group = part >> 1, first = group % kGroups * lanes;
    Spot spot;
    spot.row = span.first_row + unit * kFusedRows + tile * kPartRows;
    spot.lane = thread * kPartLanes + first + group / kGroups * (table::LANES / 2);
    spot.n = static_cast<int64_t>(unit) * kFusedUnit - span.skew + tile * kPartRows * table::LANES + spot.lane;
    random = upper;
    if constexpr (Op::kWeights && Op::Type::kPerWord == 2) {
      if (p.rounding_seed != nullptr && tile == 0) {
        // Computed each time: kept in registers it would cost every launch 19 of them.
        Schedule rounding =
            schedule(static_cast<uint64_t>(*p.rounding_seed), span.rounding_high, table::STREAM_ROUNDING);
        ZO_UNROLL
        for (int j = 0; j < lanes; ++j) {
          Words words = philox(rounding, (spot.row >> kRoundingLog2Parts << 8) + spot.lane + j);
          random.low[j] = words.w[0], random.high[j] = words.w[1];
          upper.low[j] = words.w[2], upper.high[j] = words.w[3];
        }
      }
    }
    double sums[lanes] = {};
    fused_part<Op, lanes>(p, span, op, turn, spot, random, sums);
    if constexpr (Op::kSquares) {
      if (p.squares == nullptr) continue;
      ZO_UNROLL
      for (uint32_t j = 0; j < kPartLanes; ++j) {  // indexed by constants, or they would lie in memory
        double sum = lanes == 1 ? (j == first ? sums[0] : 0.0) : sums[j % lanes];
        if (tile == 0) {
          squares[0][j] = add64(squares[0][j], sum);
        } else {
          squares[1][j] = add64(squares[1][j], sum);
        }
      }
    }
  }
}

// The tile whose sum of squares is squares[half] of a unit, or -1 for one that is not in the range.
ZO_HD int64_t tile_of(const Fused& p, const Span& span, uint32_t unit, int half) {
  int64_t n = static_cast<int64_t>(unit) * kFusedUnit - span.skew + half * (kFusedUnit / 2);
  return n >= 0 && n < p.count ? n >> 10 : -1;
}

}  // namespace zo::cuda
