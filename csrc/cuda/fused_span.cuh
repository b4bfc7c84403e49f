// The range that a fused op works on, in units, and how a thread reads and writes its lanes of it. Host code too.
#pragma once

#include <initializer_list>

#include "arguments.h"
#include "arithmetic.cuh"
#include "memory.cuh"

namespace zo::cuda {

constexpr int kPartRows = 4;
constexpr int kPartLanes = 4;
constexpr int kFusedRows = 8;
constexpr int64_t kFusedUnit = kFusedRows * table::LANES;
constexpr uint64_t kFusedWindow = uint64_t{1} << 34;  // the smallest index step at which a block's upper half changes

// One range of elements whose block numbers share their upper 32 bits, in units.
struct Span {
  uint32_t units;
  uint32_t whole_first, whole_end;  // units that need no look at each element
  uint32_t first_row;               // arena row of unit 0, modulo 2^32
  uint32_t noise_high;
  uint32_t rounding_high;
  int64_t skew;  // elements of unit 0 that lie before the range

  // `bytes`: of one weight.
  Span(const Fused& p, int bytes) {
    skew = static_cast<int64_t>(p.offset & (kFusedUnit - 1));
    first_row = static_cast<uint32_t>((p.offset - skew) >> 8);
    units = static_cast<uint32_t>((skew + p.count + kFusedUnit - 1) / kFusedUnit);
    int log2_parts = p.noise == Noise::kGaussian ? kGaussianLog2Parts : kRademacherLog2Parts;
    noise_high = static_cast<uint32_t>(p.offset >> (32 + log2_parts));
    rounding_high = static_cast<uint32_t>(p.offset >> (32 + kRoundingLog2Parts));
    bool aligned = p.bits == nullptr || (p.first - skew) % kPartLanes == 0;
    for (const void* weights : {p.x, static_cast<const void*>(p.out)}) {
      aligned &= (reinterpret_cast<uint64_t>(weights) - skew * bytes) % (kPartLanes * bytes) == 0 || p.x == nullptr;
    }
    for (const float* state : {static_cast<const float*>(p.states[0]), static_cast<const float*>(p.states[1]),
                               static_cast<const float*>(p.states[2]), p.added[0], p.added[1], p.diag}) {
      aligned &= state == nullptr || (reinterpret_cast<uint64_t>(state) - skew * 4) % sizeof(Vector) == 0;
    }
    whole_first = aligned && skew > 0 ? 1 : 0;
    whole_end = aligned ? static_cast<uint32_t>((skew + p.count) / kFusedUnit) : 0;
    if (whole_end < whole_first) whole_end = whole_first;
  }

  // The units that are cut, numbered from 0.
  ZO_HD uint32_t cut_units() const { return units - (whole_end - whole_first); }
  ZO_HD uint32_t cut_unit(uint32_t i) const { return i < whole_first ? i : i + (whole_end - whole_first); }
};

// Cuts the arguments where the upper half of a block number changes, and calls run(part, span) for each part.
template <class Run>
void for_spans(Fused p, int bytes, const Run& run) {
  while (p.count > 0) {
    Fused part = p;
    int64_t room = static_cast<int64_t>(kFusedWindow - p.offset % kFusedWindow);
    if (part.count > room) part.count = room;
    run(part, Span(part, bytes));
    uint64_t tiles = ((p.offset + part.count) >> 10) - (p.offset >> 10);
    if (p.x != nullptr) p.x = static_cast<const char*>(p.x) + part.count * bytes;
    if (p.out != nullptr) p.out = static_cast<char*>(p.out) + part.count * bytes;
    for (float*& state : p.states) state = state == nullptr ? nullptr : state + part.count;
    for (const float*& state : p.added) state = state == nullptr ? nullptr : state + part.count;
    if (p.diag != nullptr) p.diag += part.count;
    if (p.scale != nullptr) p.scale += tiles;
    if (p.valid != nullptr) p.valid += tiles;
    if (p.squares != nullptr) p.squares += tiles;
    p.first += part.count;
    p.offset += static_cast<uint64_t>(part.count);
    p.count -= part.count;
  }
}

// Where a part stands.
struct Spot {
  uint32_t row, lane;  // arena row modulo 2^32, first lane
  int64_t n;           // element at that row and lane; negative before the range
};

ZO_HD bool inside(const Fused& p, int64_t n) { return n >= 0 && n < p.count; }

// A thread has `lanes` neighbouring lanes at a time: kPartLanes, as vectors, or 1 in a unit that is cut, where each
// element may lie outside. One at a time keeps the registers of that rare case out of everybody's count.

// Neighbouring weights as they lie in memory.
template <class T, int lanes>
struct alignas(lanes == 1 ? 4 : 4 * lanes / T::kPerWord) Weights {
  static constexpr int kWords = lanes == 1 ? 1 : lanes / T::kPerWord;
  uint32_t word[kWords];
};

template <class T, int lanes>
ZO_HD Weights<T, lanes> load_weights(const Fused& p, int64_t n) {
  using Bits = typename T::Bits;
  const Bits* from = static_cast<const Bits*>(p.x) + n;
  if constexpr (lanes == 1) {
    return {inside(p, n) ? *from : Bits{0}};
  } else {
    return *reinterpret_cast<const Weights<T, lanes>*>(from);
  }
}

template <class T, int lanes>
ZO_HD void store_weights(const Fused& p, int64_t n, const Weights<T, lanes>& data) {
  using Bits = typename T::Bits;
  Bits* to = static_cast<Bits*>(p.out) + n;
  if constexpr (lanes == 1) {
    if (inside(p, n)) *to = static_cast<Bits>(data.word[0]);
  } else {
    store_words(to, data.word);
  }
}

template <int lanes>
ZO_HD void load_floats(const Fused& p, const float* from, int64_t n, float (&value)[lanes]) {
  if constexpr (lanes == 1) {
    value[0] = inside(p, n) ? from[n] : 1.0f;
  } else {
    Vector v = *reinterpret_cast<const Vector*>(from + n);
    ZO_UNROLL
    for (int j = 0; j < lanes; ++j) value[j] = bits_float(v.word[j]);
  }
}

template <int lanes>
ZO_HD void store_floats(const Fused& p, float* to, int64_t n, const float (&value)[lanes]) {
  if constexpr (lanes == 1) {
    if (inside(p, n)) to[n] = value[0];
  } else {
    Vector v;
    ZO_UNROLL
    for (int j = 0; j < lanes; ++j) v.word[j] = float_bits(value[j]);
    *reinterpret_cast<Vector*>(to + n) = v;
  }
}

}  // namespace zo::cuda
