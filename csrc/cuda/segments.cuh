// What one thread adds up of a tile of 1024 elements of a segment, in the order of `ordered_sum` in
// zoengine/ops/reference/segments.py: a tile has 256 lanes of 4 elements, 256 apart, then a halving tree over lanes.
//
// A warp takes a tile. Thread t holds the lanes t, t + 32, ..., t + 224: the upper three levels of the tree stay within
// the thread, the lower five are warp shuffles, and 32 neighbouring elements are one access. Host code too, for tests.
#pragma once

#include "arguments.h"
#include "arithmetic.cuh"
#include "memory.cuh"

namespace zo::cuda {

constexpr int kTileRows = 4;
constexpr int kTile = kTileRows * table::LANES;
constexpr int kWarp = 32;
constexpr int kThreadLanes = table::LANES / kWarp;

// The upper three levels of the tree: lanes 128, 64 and 32 apart.
ZO_HD double thread_tree(const double (&lane)[kThreadLanes]) {
  double a = add64(add64(lane[0], lane[4]), add64(lane[2], lane[6]));
  double b = add64(add64(lane[1], lane[5]), add64(lane[3], lane[7]));
  return add64(a, b);
}

// A result: what a tile, a lane of tiles and a segment are reduced to.
struct Dot {
  static constexpr int kDoubles = 1;
  double sum = 0.0;

  ZO_HD void append(const Dot& next) { sum = add64(sum, next.sum); }
  ZO_HD void store(double* to) const { to[0] = sum; }
  static ZO_HD Dot load(const double* from) { return {from[0]}; }
};

struct Stats {
  static constexpr int kDoubles = 4;
  double sum = 0.0, squares = 0.0;
  float least = bits_float(0x7F800000u), most = bits_float(0xFF800000u);

  ZO_HD void append(const Stats& next) {
    sum = add64(sum, next.sum);
    squares = add64(squares, next.squares);
    least = min_nan(least, next.least);
    most = max_nan(most, next.most);
  }
  ZO_HD void store(double* to) const {
    to[0] = sum;
    to[1] = squares;
    to[2] = least;
    to[3] = most;
  }
  static ZO_HD Stats load(const double* from) {
    return {from[0], from[1], static_cast<float>(from[2]), static_cast<float>(from[3])};
  }
};

// Each source below gives a thread's share of the tile x[n .. n + count), count <= 1024.

template <class T>
struct StatsSource {
  using Result = Stats;
  const void* x;

  explicit StatsSource(const Segments& args, const Factor&) : x(args.x) {}
  ZO_HD Stats operator()(int64_t n, int64_t count, int thread) const {
    Stats result;
    double sum[kThreadLanes], squares[kThreadLanes];
    ZO_UNROLL
    for (int j = 0; j < kThreadLanes; ++j) {
      sum[j] = squares[j] = 0.0;
      ZO_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        int m = r * static_cast<int>(table::LANES) + j * kWarp + thread;
        if (m >= count) continue;
        float value = load_one<T>(x, n + m);
        sum[j] = add64(sum[j], value);
        squares[j] = fma64(value, value, squares[j]);
        result.least = min_nan(result.least, value);
        result.most = max_nan(result.most, value);
      }
    }
    result.sum = thread_tree(sum);
    result.squares = thread_tree(squares);
    return result;
  }
};

template <class T, class Y>
struct DotSource {
  using Result = Dot;
  const void *x, *y;

  explicit DotSource(const Segments& args, const Factor& factor) : x(args.x), y(factor.y) {}
  ZO_HD Dot operator()(int64_t n, int64_t count, int thread) const {
    double sum[kThreadLanes];
    ZO_UNROLL
    for (int j = 0; j < kThreadLanes; ++j) {
      sum[j] = 0.0;
      ZO_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        int m = r * static_cast<int>(table::LANES) + j * kWarp + thread;
        if (m < count) sum[j] = fma64(load_one<T>(x, n + m), load_one<Y>(y, n + m), sum[j]);
      }
    }
    return {thread_tree(sum)};
  }
};

// z of the four elements index, index + 256, ... of a stream. They belong to one Philox call, or to two where a segment
// does not start at a multiple of 1024.
template <Noise noise>
ZO_HD void four_rows(uint64_t seed, uint64_t index, uint32_t stream, float (&z)[kTileRows]) {
  if constexpr (noise == Noise::kGaussian) {
    Place first = place<kGaussianLog2Parts>(index);
    gaussian4(philox(seed, first.block, stream), z);
    if (first.part == 0) return;
    float next[4];
    gaussian4(philox(seed, first.block + table::LANES, stream), next);
    if (first.part == 1) {
      z[0] = z[1], z[1] = z[2], z[2] = z[3], z[3] = next[0];
    } else if (first.part == 2) {
      z[0] = z[2], z[1] = z[3], z[2] = next[0], z[3] = next[1];
    } else {
      z[0] = z[3], z[1] = next[0], z[2] = next[1], z[3] = next[2];
    }
  } else {
    Place first = place<kRademacherLog2Parts>(index);
    Words words = philox(seed, first.block, stream);
    uint32_t word = pick(words, first.part >> 5);
    uint32_t bits = word >> (first.part & 31);
    if ((first.part & 31) > 32 - kTileRows) {  // reaches into the next word, or the next call
      uint32_t next = (first.part >> 5) + 1;
      if (next == 4) words = philox(seed, first.block + table::LANES, stream);
      bits |= pick(words, next & 3) << (32 - (first.part & 31));
    }
    ZO_UNROLL
    for (int r = 0; r < kTileRows; ++r) z[r] = bits >> r & 1 ? 1.0f : -1.0f;
  }
}

template <class T, Noise noise>
struct NoiseSource {
  using Result = Dot;
  const void* x;
  const int64_t* seed;
  uint64_t offset;
  uint32_t stream;

  explicit NoiseSource(const Segments& args, const Factor& factor)
      : x(args.x), seed(factor.seed), offset(factor.offset), stream(factor.stream) {}
  ZO_HD Dot operator()(int64_t n, int64_t count, int thread) const {
    double sum[kThreadLanes];
    ZO_UNROLL
    for (int j = 0; j < kThreadLanes; ++j) {
      int lane = j * kWarp + thread;
      float z[kTileRows];
      four_rows<noise>(static_cast<uint64_t>(*seed), offset + static_cast<uint64_t>(n + lane), stream, z);
      sum[j] = 0.0;
      ZO_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        int m = r * static_cast<int>(table::LANES) + lane;
        if (m < count) sum[j] = fma64(load_one<T>(x, n + m), z[r], sum[j]);
      }
    }
    return {thread_tree(sum)};
  }
};

}  // namespace zo::cuda
