// rule_step over whole units. A rule says what becomes of one vector: its sum acc, its states (in place) and its noise.
#pragma once

#include "tile_noise.h"

namespace zo {
inline namespace ZO_ISA {

using cpu::RuleStep;
using cpu::Scratch;
using cpu::Update;

// The noise of one vector and the numbers of the rule.
template <class V>
struct RuleInput {
  using F = typename V::F;
  const float* z;  // the next term is kTile further
  int64_t count;
  const float* coefficients;
  const float* scalars;

  ZO_HD F s(int i) const { return V::splat(scalars[i]); }
  ZO_HD F noise(int64_t k) const { return V::load(z + k * kTile); }
  ZO_HD F coefficient(int64_t k) const { return V::splat(coefficients[k]); }
  // sum_k coefficient_k z_k
  ZO_HD F combined() const {
    F total = V::splat(0.0f);
    for (int64_t k = 0; k < count; ++k) total = V::fma(coefficient(k), noise(k), total);
    return total;
  }
};

struct SignRule {
  static constexpr int kStates = 0;
  template <class V>
  static ZO_HD typename V::F step(typename V::F acc, typename V::F*, const RuleInput<V>& in) {
    return V::fma(in.s(0), V::sign(in.combined()), acc);
  }
};

template <bool kLargest>
struct AdamRule {
  static constexpr int kStates = kLargest ? 3 : 2;
  template <class V>
  static ZO_HD typename V::F step(typename V::F acc, typename V::F* states, const RuleInput<V>& in) {
    const typename V::F g = in.combined();
    states[0] = V::fma(in.s(1), g, V::mul(in.s(0), states[0]));
    states[1] = V::fma(V::mul(in.s(3), g), g, V::mul(in.s(2), states[1]));
    if constexpr (kLargest) states[2] = V::max(states[2], states[1]);
    const typename V::F divisor = V::fma(V::sqrt(states[kStates - 1]), in.s(4), in.s(5));
    return V::fma(in.s(6), V::div(states[0], divisor), acc);
  }
};

struct AdamuRule {
  static constexpr int kStates = 1;
  template <class V>
  static ZO_HD typename V::F step(typename V::F acc, typename V::F* states, const RuleInput<V>& in) {
    using F = typename V::F;
    const F m = V::fma(in.s(0), states[0], in.combined());
    const F first = V::mul(in.s(1), in.noise(0)), second = V::fma(in.s(2), in.noise(1), states[0]);
    const F v = V::fma(V::mul(in.s(3), first), first, V::mul(V::mul(in.s(4), second), second));
    states[0] = V::mul(in.s(7), m);
    return V::fma(in.s(6), V::div(m, V::sqrt(V::add(v, in.s(5)))), acc);
  }
};

struct HizooRule {
  static constexpr int kStates = 1;
  template <class V>
  static ZO_HD typename V::F step(typename V::F acc, typename V::F* states, const RuleInput<V>& in) {
    using F = typename V::F;
    const F centre = V::splat(-in.scalars[1]);
    F change = V::splat(0.0f);
    for (int64_t k = 0; k < in.count; ++k) {
      const F z = in.noise(k);
      change = V::fma(in.coefficient(in.count + k), V::fma(z, z, centre), change);
    }
    const F next = V::max(V::fma(change, states[0], V::mul(in.s(0), states[0])), in.s(2));
    const F root = V::sqrt(in.scalars[3] != 0 ? next : states[0]);
    for (int64_t k = 0; k < in.count; ++k) acc = V::fma(in.coefficient(k), V::div(in.noise(k), root), acc);
    states[0] = next;
    return acc;
  }
};

struct AdamReplayRule {
  static constexpr int kStates = 0;
  template <class V>
  static ZO_HD typename V::F step(typename V::F acc, typename V::F*, const RuleInput<V>& in) {
    using F = typename V::F;
    F m = V::splat(0.0f), v = m;
    for (int64_t k = 0; k < in.count; ++k) {
      const F z = in.noise(k);
      m = V::fma(in.coefficient(k), z, m);
      v = V::fma(V::mul(in.coefficient(in.count + k), z), z, v);
    }
    return V::fma(in.s(2), V::div(m, V::fma(V::sqrt(v), in.s(0), in.s(1))), acc);
  }
};

template <class V, class T, class R>
ZO_HD void rule_tile(const RuleStep& args, const float* z, T* x, float* const* states, const uint32_t* rounding) {
  using F = typename V::F;
  for (int row = 0; row < 4; ++row) {
    for (int lane = 0; lane < 256; lane += V::kLanes) {
      const int at = row * 256 + lane;
      F acc = InOrder<V, T>::load(x + at), values[R::kStates + 1];
      if (args.keep) acc = V::mul(acc, V::splat(*args.keep));
      for (int j = 0; j < R::kStates; ++j) values[j] = V::load(states[j] + at);
      acc = R::template step<V>(acc, values, {z + at, args.noise.count, args.coefficients, args.scalars});
      for (int j = 0; j < R::kStates; ++j) V::store(states[j] + at, values[j]);
      store_rounded<V, T>(x + at, acc, args.rounding, rounding, row, lane);
    }
  }
}

template <class V, class T, class R>
void rule_units(const RuleStep& args, const Update& update, Scratch scratch) {
  alignas(64) uint32_t rounding[kWordsPerTile];
  TileNoise<V> noise(args.noise, scratch.words);
  for (int64_t u = 0; u < update.units; ++u) {
    const uint64_t unit = update.first_unit + static_cast<uint64_t>(u);
    if (args.rounding) {
      PhiloxTile<V, false>::run(rounding, *args.rounding, unit * 256, table::STREAM_ROUNDING, nullptr, 0);
    }
    for (int half = 0; half < 2; ++half) {
      const int64_t place = (2 * u + half) * kTile;
      T* x = static_cast<T*>(update.x) + place;
      float* states[R::kStates + 1];
      for (int j = 0; j < R::kStates; ++j) states[j] = update.states[j] + place;
      const Ahead next_x{reinterpret_cast<const char*>(x + kTile), 4 * sizeof(T)};
      Ahead next_state{nullptr, 0};
      if (R::kStates) next_state = {reinterpret_cast<const char*>(states[0] + kTile), 16};
      noise.draw(2 * unit + half, scratch.z, kTile, next_x, next_state);
      rule_tile<V, T, R>(args, scratch.z, x, states, rounding + half * 512);
    }
  }
}

template <class V, class T>
void rule_step(const RuleStep& args, const Update& update, Scratch scratch) {
  switch (args.rule) {
    case cpu::kSign:
      return rule_units<V, T, SignRule>(args, update, scratch);
    case cpu::kAdam:
      return rule_units<V, T, AdamRule<false>>(args, update, scratch);
    case cpu::kAmsgrad:
      return rule_units<V, T, AdamRule<true>>(args, update, scratch);
    case cpu::kAdamu:
      return rule_units<V, T, AdamuRule>(args, update, scratch);
    case cpu::kHizoo:
      return rule_units<V, T, HizooRule>(args, update, scratch);
    case cpu::kAdamReplay:
      return rule_units<V, T, AdamReplayRule>(args, update, scratch);
  }
}

}  // namespace ZO_ISA
}  // namespace zo
