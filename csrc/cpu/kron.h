// kron_rows and kron_score over rows of one matrix. A row's numbers are drawn into a window that stays in the nearest
// caches, dotted with a, then added to x and to the score.
#pragma once

#include "sums.h"
#include "windows.h"

namespace zo {
inline namespace ZO_ISA {

using cpu::Kron;
using cpu::KronRows;

// a . z in the order of `row_dots` in zoengine/ops/reference/matrices.py: 256 lanes by arena index, then a halving
// tree. `slot` is the lane of the first element.
template <class V>
ZO_HD float row_dot(const float* a, const float* z, int64_t count, int slot) {
  alignas(64) float lanes[256] = {};
  for (int64_t i = 0; i < count; slot = 0) {
    const int64_t stop = count - i < 256 - slot ? count - i : 256 - slot;
    along<V>(stop, [&](auto machine, int64_t j) {
      using M = decltype(machine);
      float* lane = lanes + slot + j;
      M::store(lane, M::fma(M::load(a + i + j), M::load(z + i + j), M::load(lane)));
    });
    i += stop;
  }
  return tree_sum(lanes);
}

// What one term adds to a row: coefficient (z + projection a) to x, and weight z to the score.
struct RowTerm {
  float coefficient, projection, weight;
};

template <class V, class T>
ZO_HD void kron_row(const RowTerm* terms, int64_t term_count, const float* z, int64_t stride, const float* a,
                    const float* keep, const T* x, T* out, const float* random, float* score, int64_t columns) {
  along<V>(columns, [&](auto machine, int64_t i) {
    using M = decltype(machine);
    using F = typename M::F;
    if (out) {
      const F direction = M::load(a + i);
      F acc = InOrder<M, T>::load(x + i);
      if (keep) acc = M::mul(acc, M::splat(*keep));
      for (int64_t k = 0; k < term_count; ++k) {
        const F moved = M::fma(M::splat(terms[k].projection), direction, M::load(z + k * stride + i));
        acc = M::fma(M::splat(terms[k].coefficient), moved, acc);
      }
      store_at<M>(out + i, acc, random ? random + i : nullptr);
    }
    if (score) {
      F part = M::load(score + i);
      for (int64_t k = 0; k < term_count; ++k) {
        part = M::fma(M::splat(terms[k].weight), M::load(z + k * stride + i), part);
      }
      M::store(score + i, part);
    }
  });
}

template <class V, class T>
void kron_rows(const Kron& args, const KronRows& work, Scratch scratch) {
  const MatrixRows& rows = work.rows;
  const int64_t count = args.noise.count, columns = rows.columns;
  Window<TileRounding<V>> rounding(TileRounding<V>(args.rounding), scratch.z, 1, args.window);
  Window<TileNoise<V>> noise(TileNoise<V>(args.noise, scratch.words), scratch.z + args.window, count, args.window);
  RowTerm* terms = reinterpret_cast<RowTerm*>(scratch.z + (count + 1) * args.window);
  for (int64_t row = 0; row < rows.rows; ++row) {
    const uint64_t index = rows.index + static_cast<uint64_t>(row * columns);
    const T* x = rows.out ? static_cast<const T*>(rows.x) + row * columns : nullptr;
    T* out = rows.out ? static_cast<T*>(rows.out) + row * columns : nullptr;
    noise.cover(index, columns, x, x ? sizeof(T) : 0);
    for (int64_t k = 0; k < count; ++k) {
      const float dot = row_dot<V>(work.a, noise.at(index, k), columns, static_cast<int>(index & 255));
      const float coefficient = args.noise.terms[k].coefficient;
      terms[k] = {coefficient, -(work.kappa * dot), coefficient * dot};
    }
    const float* random = nullptr;
    if (out && args.rounding) {
      rounding.cover(index, columns, nullptr, 0);
      random = rounding.at(index);
    }
    float* score = work.score ? work.score + row / cpu::kRowBlock * columns : nullptr;
    if (score && row % cpu::kRowBlock == 0) __builtin_memset(score, 0, static_cast<uint64_t>(columns) * sizeof(float));
    kron_row<V, T>(terms, count, noise.at(index), args.window, work.a, args.keep, x, out, random, score, columns);
  }
}

}  // namespace ZO_ISA
}  // namespace zo
