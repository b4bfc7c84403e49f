// Sums over one tile, most of them in fp64, in the order that every backend keeps.
#pragma once

#include "api.h"
#include "memory.h"

namespace zo {
inline namespace ZO_ISA {

using cpu::kTile;
using cpu::Stats;

template <class V, class T>
void to_float(const void* values, float* out, int64_t count) {
  const T* p = static_cast<const T*>(values);
  along<V>(count, [&](auto machine, int64_t i) {
    using M = decltype(machine);
    M::store(out + i, InOrder<M, T>::load(p + i));
  });
}

// The sum of 256 lanes by a halving tree.
template <class Number>
ZO_HD Number tree_sum(Number (&lanes)[256]) {
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

// The sum of squares.
template <class V>
double square_tile(const float* x) {
  alignas(64) double lanes[256];
  for (int i = 0; i < 256; ++i) {
    double sum = 0;
    for (int row = 0; row < kTile; row += 256) {
      const double value = x[i + row];
      sum += value * value;
    }
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

}  // namespace ZO_ISA
}  // namespace zo
