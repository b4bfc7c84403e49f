// lowrank_add over rows of one matrix. The products of a few rows are taken panel by panel, so that a panel of the
// right factor is read from the nearest cache, and wait in scratch; then x is read and written once, row by row.
#pragma once

#include "windows.h"

namespace zo {
inline namespace ZO_ISA {

using cpu::kGroupRows;
using cpu::kPanel;
using cpu::LowRank;
using cpu::LowRankRows;

// n rows of left right' over a panel; the rank is summed in order, from 0.
template <class V, int n>
ZO_HD void panel_product(const float* left, const float* panel, int64_t rank, float* products, int64_t stride) {
  constexpr int kLanes = V::kLanes, kWide = 2;
  for (int column = 0; column < kPanel; column += kWide * kLanes) {
    typename V::F sums[n][kWide];
    ZO_UNROLL
    for (int r = 0; r < n; ++r) {
      ZO_UNROLL
      for (int v = 0; v < kWide; ++v) sums[r][v] = V::splat(0.0f);
    }
    for (int64_t k = 0; k < rank; ++k) {
      typename V::F right[kWide];
      ZO_UNROLL
      for (int v = 0; v < kWide; ++v) right[v] = V::load(panel + k * kPanel + column + v * kLanes);
      ZO_UNROLL
      for (int r = 0; r < n; ++r) {
        const typename V::F factor = V::splat(left[r * rank + k]);
        ZO_UNROLL
        for (int v = 0; v < kWide; ++v) sums[r][v] = V::fma(factor, right[v], sums[r][v]);
      }
    }
    ZO_UNROLL
    for (int r = 0; r < n; ++r) {
      ZO_UNROLL
      for (int v = 0; v < kWide; ++v) V::store(products + r * stride + column + v * kLanes, sums[r][v]);
    }
  }
}

// out = x keep + coefficient product over a row.
template <class V, class T>
ZO_HD void add_product(const LowRank& args, const T* x, T* out, const float* product, const float* random,
                       int64_t columns) {
  along<V>(columns, [&](auto machine, int64_t i) {
    using M = decltype(machine);
    typename M::F acc = InOrder<M, T>::load(x + i);
    if (args.keep) acc = M::mul(acc, M::splat(*args.keep));
    acc = M::fma(M::splat(args.coefficient), M::load(product + i), acc);
    store_at<M>(out + i, acc, random ? random + i : nullptr);
  });
}

template <class V, class T>
void lowrank_rows(const LowRank& args, const LowRankRows& work, Scratch scratch) {
  const MatrixRows& rows = work.rows;
  const int64_t columns = rows.columns, rank = args.rank;
  const int64_t panels = (columns + kPanel - 1) / kPanel, stride = panels * kPanel;
  float* products = scratch.z + args.window;
  // A right factor that the second-level cache cannot hold is read once for many rows.
  const int64_t group = stride * rank <= 1 << 15 ? 4 : kGroupRows;
  Window<TileRounding<V>> rounding(TileRounding<V>(args.rounding), scratch.z, 1, args.window);
  for (int64_t first = 0; first < rows.rows; first += group) {
    const int64_t count = rows.rows - first < group ? rows.rows - first : group;
    for (int64_t p = 0; p < panels; ++p) {
      const float* panel = work.right + p * rank * kPanel;
      int64_t r = 0;
      for (; r + 4 <= count; r += 4) {
        panel_product<V, 4>(work.left + (first + r) * rank, panel, rank, products + r * stride + p * kPanel, stride);
      }
      for (; r < count; ++r) {
        panel_product<V, 1>(work.left + (first + r) * rank, panel, rank, products + r * stride + p * kPanel, stride);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t place = (first + r) * columns;
      const uint64_t index = rows.index + static_cast<uint64_t>(place);
      const float* random = nullptr;
      if (args.rounding) {
        rounding.cover(index, columns, nullptr, 0);
        random = rounding.at(index);
      }
      add_product<V, T>(args, static_cast<const T*>(rows.x) + place, static_cast<T*>(rows.out) + place,
                        products + r * stride, random, columns);
    }
  }
}

}  // namespace ZO_ISA
}  // namespace zo
