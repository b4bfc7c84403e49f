// state_fold over whole units: each tile's numbers are drawn once and go into the state and into x.
#pragma once

#include "sums.h"
#include "tile_noise.h"

namespace zo {
inline namespace ZO_ISA {

using cpu::Scratch;
using cpu::StateFold;
using cpu::Update;

template <class V, class T, bool kFused>
ZO_HD void fold_tile(const StateFold& args, const float* z, float* state, T* x, const uint32_t* rounding) {
  using F = typename V::F;
  const int64_t count = args.noise.count;
  for (int row = 0; row < 4; ++row) {
    for (int lane = 0; lane < 256; lane += V::kLanes) {
      const int at = row * 256 + lane;
      const F old = V::load(state + at);
      F now = args.keep ? V::mul(old, V::splat(*args.keep)) : old, sum;
      if constexpr (kFused) {
        sum = InOrder<V, T>::load(x + at);
        if (args.x_keep) sum = V::mul(sum, V::splat(*args.x_keep));
      }
      for (int64_t k = 0; k < count; ++k) {
        const F value = V::load(z + k * kTile + at);
        now = V::fma(V::splat(args.noise.terms[k].coefficient), value, now);
        if constexpr (kFused) sum = V::fma(V::splat(args.x_coefficients[k]), value, sum);
      }
      V::store(state + at, now);
      if constexpr (kFused) {
        sum = V::fma(V::splat(args.x_coefficients[count]), old, sum);
        sum = V::fma(V::splat(args.x_coefficients[count + 1]), now, sum);
        store_rounded<V, T>(x + at, sum, args.rounding, rounding, row, lane);
      }
    }
  }
}

// The sum of squares of the first `valid` values of a tile.
template <class V>
ZO_HD double squares_of(const float* state, int valid) {
  if (valid >= kTile) return square_tile<V>(state);
  alignas(64) float counted[kTile];
  for (int i = 0; i < kTile; ++i) counted[i] = i < valid ? state[i] : 0.0f;
  return square_tile<V>(counted);
}

template <class V, class T>
void state_fold(const StateFold& args, const Update& update, Scratch scratch) {
  alignas(64) uint32_t rounding[kWordsPerTile];
  TileNoise<V> noise(args.noise, scratch.words);
  const float* z = scratch.z;
  for (int64_t u = 0; u < update.units; ++u) {
    const uint64_t unit = update.first_unit + static_cast<uint64_t>(u);
    if (args.rounding) {
      PhiloxTile<V, false>::run(rounding, *args.rounding, unit * 256, table::STREAM_ROUNDING, nullptr, 0);
    }
    for (int half = 0; half < 2; ++half) {
      const int64_t tile = 2 * u + half;
      float* state = update.states[0] + tile * kTile;
      T* x = update.x ? static_cast<T*>(update.x) + tile * kTile : nullptr;
      const Ahead next_x = x ? Ahead{reinterpret_cast<const char*>(x + kTile), 4 * sizeof(T)} : Ahead{nullptr, 0};
      const Ahead next_state{reinterpret_cast<const char*>(state + kTile), 16};
      noise.draw(2 * unit + half, scratch.z, kTile, next_state, next_x);
      if (x) {
        fold_tile<V, T, true>(args, z, state, x, rounding + half * 512);
      } else {
        fold_tile<V, T, false>(args, z, state, x, rounding);
      }
      if (update.valid) update.squares[tile] = squares_of<V>(state, update.valid[tile]);
    }
  }
}

}  // namespace ZO_ISA
}  // namespace zo
