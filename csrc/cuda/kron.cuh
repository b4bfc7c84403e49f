// What a block of 256 threads does with 64 rows of a matrix in kron_rows_ and kron_score.
//
// A row's noise is needed twice: for its dot product with a, then for the row itself. Thread t draws the noise of lane t
// (arena index modulo 256), which is also the share of the dot product that it adds up. Rows that lie behind each other
// are drawn together, so that no tile is drawn twice: as many rows as fit into shared memory with all terms. A row that
// does not fit is drawn again.
//
// Weights are then taken as vectors, or by lane where rounding is stochastic (one call of rounding bits serves a lane)
// or an address does not suit. The body is written over a `Crew`, which runs a function for all threads and waits.
#pragma once

#include "arithmetic.cuh"
#include "matrices.cuh"
#include "memory.cuh"
#include "tile_noise.cuh"

namespace zo::cuda {

constexpr int kCrew = table::LANES;  // threads
constexpr int kHeldDots = 16;        // dot products that are summed at once

// Floats of shared memory: sums of lanes, then dot products as projections and as weights of the score, then noise.
ZO_HD int32_t kron_dots(int32_t terms) { return terms > kHeldDots ? terms : kHeldDots; }
ZO_HD int64_t kron_shared(int32_t terms, int32_t capacity) {
  return kHeldDots * kCrew + 2 * ((kron_dots(terms) + 3) / 4 * 4) + capacity;
}

ZO_HD TileNoise term_noise(const Kron& p, int k, uint64_t index) {
  return {k < p.terms ? static_cast<uint64_t>(p.seeds[k]) : 0, table::STREAM_DIRECTION, p.noise, index};
}

// The rows being worked on: they begin at arena index `index`, which is element `start` of x.
struct Rows {
  uint64_t index;
  int64_t start;
  int32_t count, columns, total;  // total: their elements
  int32_t span;                   // floats of shared memory for one term's noise; 0: not held
  const float* a;
  float kappa;
  float* parts;  // of this block; null: no score
  bool first;    // nothing was added to parts yet
};

// Shared memory as the phases see it.
struct KronMemory {
  float* lanes;    // [item][256]; item = term * rows + row
  float* project;  // [item]: -(kappa dot)
  float* weight;   // [item]: coefficient dot
  float* noise;    // [term][element]

  ZO_HD KronMemory(float* base, int32_t terms) {
    int32_t dots = (kron_dots(terms) + 3) / 4 * 4;
    lanes = base;
    project = lanes + kHeldDots * kCrew;
    weight = project + dots;
    noise = weight + dots;
  }
};

// Thread `lane` draws term k of all rows, keeps it if there is room, and leaves its share of the dot products as items
// item, item + 1, ...
ZO_HD void draw(const Kron& p, const Rows& rows, const KronMemory& m, int k, int item, uint32_t lane) {
  TileNoise noise = term_noise(p, k, rows.index);
  hold(noise.schedule);
  float* to = rows.span > 0 ? m.noise + k * rows.span : nullptr;
  float* sums = m.lanes + item * kCrew + lane;
  const int32_t first = -static_cast<int32_t>(rows.index & 1023) + static_cast<int32_t>(lane);
  int32_t row = 0, end = rows.columns;  // the row being summed, and where it ends
  float sum = 0.0f;
  uint64_t tile = rows.index >> 10;
  for (int32_t n = first; n < rows.total; n += 1024, ++tile) {
    constexpr int kStep = table::LANES;
    float z[4];
    noise.tile(tile, lane, z);
    if (n >= end - rows.columns && n + 3 * kStep < end) {
      const float* a = rows.a + (n - (end - rows.columns));
      ZO_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (to != nullptr) to[n + i * kStep] = z[i];
        sum = fma32(a[i * kStep], z[i], sum);
      }
      continue;
    }
    ZO_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int32_t element = n + i * kStep;
      if (element < 0 || element >= rows.total) continue;
      for (; element >= end; end += rows.columns, ++row) {
        sums[row * kCrew] = sum;
        sum = 0.0f;
      }
      if (to != nullptr) to[element] = z[i];
      sum = fma32(rows.a[element - (end - rows.columns)], z[i], sum);
    }
  }
  for (; row < rows.count; ++row) {
    sums[row * kCrew] = sum;
    sum = 0.0f;
  }
}

template <class T>
ZO_HD bool rows_suit_vectors(const Kron& p, const Rows& rows) {
  constexpr int kLanes = 4 * T::kPerWord;
  const int64_t bytes = rows.start * static_cast<int64_t>(sizeof(typename T::Bits));
  return rows.columns % kLanes == 0 &&
         ((reinterpret_cast<uint64_t>(p.x) + bytes) | (reinterpret_cast<uint64_t>(p.out) + bytes) |
          reinterpret_cast<uint64_t>(rows.a)) % sizeof(Vector) == 0;
}

// Held rows, by vectors.
template <class T>
ZO_HD void apply_vectors(const Kron& p, const Rows& rows, const KronMemory& m, uint32_t thread) {
  using Bits = typename T::Bits;
  constexpr int kLanes = 4 * T::kPerWord;
  const Bits* from = static_cast<const Bits*>(p.x) + rows.start;
  Bits* to = static_cast<Bits*>(p.out) + rows.start;
  const float keep = p.keep == nullptr ? 1.0f : *p.keep;
  int32_t n = static_cast<int32_t>(thread) * kLanes;
  int32_t row = n / rows.columns, column = n % rows.columns;
  for (; n < rows.total; n += kCrew * kLanes) {
    Vector data = *reinterpret_cast<const Vector*>(from + n);
    float acc[kLanes], a[kLanes];
    ZO_UNROLL
    for (int w = 0; w < 4; ++w) T::unpack(data.word[w], acc + w * T::kPerWord);
    ZO_UNROLL
    for (int v = 0; v < kLanes / 4; ++v) {
      Vector four = *reinterpret_cast<const Vector*>(rows.a + column + 4 * v);
      ZO_UNROLL
      for (int j = 0; j < 4; ++j) a[4 * v + j] = bits_float(four.word[j]);
    }
    ZO_UNROLL
    for (int j = 0; j < kLanes; ++j) acc[j] = Scalar::mul(acc[j], keep);
    for (int k = 0; k < p.terms; ++k) {
      const float coefficient = p.coeffs[k], projection = m.project[k * rows.count + row];
      ZO_UNROLL
      for (int v = 0; v < kLanes / 4; ++v) {
        Vector z = *reinterpret_cast<const Vector*>(m.noise + k * rows.span + n + 4 * v);
        ZO_UNROLL
        for (int j = 0; j < 4; ++j) {
          float moved = fma32(projection, a[4 * v + j], bits_float(z.word[j]));
          acc[4 * v + j] = fma32(coefficient, moved, acc[4 * v + j]);
        }
      }
    }
    ZO_UNROLL
    for (int w = 0; w < 4; ++w) data.word[w] = T::pack(acc + w * T::kPerWord);
    store_vector(to + n, data);
    for (column += kCrew * kLanes; column >= rows.columns; column -= rows.columns) ++row;
  }
}

template <class T>
ZO_HD uint32_t round_one(const Kron& p, float value, uint32_t random16) {
  float pair[2] = {value, 0.0f};
  if constexpr (T::kPerWord == 2) {
    if (p.rounding_seed != nullptr) {
      uint32_t bits[2] = {random16, 0};
      T::template quiet<2>(pair);
      return T::pack_stochastic(pair, bits);
    }
  }
  return T::pack(pair);
}

// Rows by lane: those that no vector suits, and rows that are not held, whose noise is drawn again and whose share of
// the score is taken on the way.
template <class T>
ZO_HD void apply_lanes(const Kron& p, const Rows& rows, const KronMemory& m, uint32_t lane) {
  constexpr int kStep = table::LANES;
  const int32_t first = -static_cast<int32_t>(rows.index & 2047) + static_cast<int32_t>(lane);
  const bool stochastic = T::kPerWord == 2 && p.x != nullptr && p.rounding_seed != nullptr;
  TileNoise noise = term_noise(p, 0, rows.index);  // a single term's stays
  int32_t row = 0, end = rows.columns;
  for (int32_t n = first; n < rows.total; n += 2048) {
    const uint64_t index = rows.index + static_cast<uint64_t>(static_cast<int64_t>(n));
    Words random{};
    if (stochastic) {
      random = philox(static_cast<uint64_t>(*p.rounding_seed), place<kRoundingLog2Parts>(index).block,
                      table::STREAM_ROUNDING);
    }
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      float acc[4], part[4], a[4];
      bool inside[4];
      int32_t at[4];
      ZO_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int32_t element = n + (4 * half + i) * kStep;
        inside[i] = element >= 0 && element < rows.total;
        if (!inside[i]) continue;
        for (; element >= end; end += rows.columns) ++row;
        at[i] = row;
        const int32_t column = element - (end - rows.columns);
        a[i] = rows.a[column];
        if (p.x != nullptr) {
          float weight = load_one<T>(p.x, rows.start + element);
          acc[i] = p.keep == nullptr ? weight : Scalar::mul(weight, *p.keep);
        }
        if (rows.span == 0 && rows.parts != nullptr) part[i] = rows.first ? 0.0f : rows.parts[column];
      }
      for (int k = 0; k < p.terms; ++k) {
        float z[4];
        if (rows.span == 0) {
          if (p.terms > 1) noise = term_noise(p, k, index);
          noise.tile((index >> 10) + half, lane, z);
        }
        ZO_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (!inside[i]) continue;
          if (rows.span > 0) z[i] = m.noise[k * rows.span + n + (4 * half + i) * kStep];
          const int32_t item = k * rows.count + at[i];
          acc[i] = fma32(p.coeffs[k], fma32(m.project[item], a[i], z[i]), acc[i]);
          if (rows.span == 0) part[i] = fma32(m.weight[item], z[i], part[i]);
        }
      }
      ZO_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (!inside[i]) continue;
        const int32_t element = n + (4 * half + i) * kStep;
        if (p.x != nullptr) {
          uint32_t random16 = pick(random, 2 * half + (i >> 1)) >> (16 * (i & 1)) & 0xFFFF;
          store_one<T>(p.out, rows.start + element, round_one<T>(p, acc[i], random16));
        }
        if (rows.span == 0 && rows.parts != nullptr) rows.parts[element] = part[i];  // one row: its column
      }
    }
  }
}

// What held rows add to their block's share of the score: columns thread, thread + 256, ...
ZO_HD void add_score(const Kron& p, const Rows& rows, const KronMemory& m, uint32_t thread) {
  for (int32_t column = static_cast<int32_t>(thread); column < rows.columns; column += kCrew) {
    float part = rows.first ? 0.0f : rows.parts[column];
    for (int32_t row = 0; row < rows.count; ++row) {
      for (int k = 0; k < p.terms; ++k) {
        part = fma32(m.weight[k * rows.count + row], m.noise[k * rows.span + row * rows.columns + column], part);
      }
    }
    rows.parts[column] = part;
  }
}

template <class T, class Crew>
ZO_HD void kron_block(const Kron& p, int64_t block, float* shared, Crew& crew) {
  const RowBlock here = row_block(p.matrices, p.first_block + block);
  if (here.columns == 0) return;
  const KronMemory m(shared, p.terms);
  Rows rows;
  rows.columns = here.columns;
  rows.a = p.a + here.factors[0];
  rows.kappa = p.kappa == nullptr ? 0.0f : p.kappa[here.matrix];
  rows.parts = p.parts == nullptr ? nullptr : p.parts + block * p.matrices.widest;
  int32_t held = p.terms == 0 ? kHeldDots : kHeldDots / p.terms;  // rows at once
  if (held > 0) {
    int32_t room = p.terms == 0 ? p.capacity : p.capacity / p.terms / 4 * 4;
    if (held > room / here.columns) held = room / here.columns;
  }
  for (int32_t row = 0; row < here.rows; row += rows.count) {
    rows.first = row == 0;
    rows.count = held < 1 ? 1 : held < here.rows - row ? held : here.rows - row;
    rows.start = here.start + static_cast<int64_t>(row) * here.columns;
    rows.index = p.offset + static_cast<uint64_t>(rows.start);
    rows.total = rows.count * rows.columns;
    rows.span = held > 0 ? (rows.total + 3) / 4 * 4 : 0;
    const auto store = [&](int item, int k, float dot) {
      m.project[item] = -Scalar::mul(rows.kappa, dot);
      m.weight[item] = Scalar::mul(p.coeffs[k], dot);
    };
    if (held > 0) {
      crew.each([&](uint32_t t) {
        for (int k = 0; k < p.terms; ++k) draw(p, rows, m, k, k * rows.count, t);
      });
      crew.trees(p.terms * rows.count, m.lanes, [&](int item, float dot) { store(item, item / rows.count, dot); });
    } else {
      for (int k = 0; k < p.terms; ++k) {
        crew.each([&](uint32_t t) { draw(p, rows, m, k, 0, t); });
        crew.trees(1, m.lanes, [&](int, float dot) { store(k, k, dot); });
      }
    }
    crew.each([&](uint32_t t) {
      if (held < 1) {
        apply_lanes<T>(p, rows, m, t);
        return;
      }
      if (p.x != nullptr) {
        bool stochastic = p.rounding_seed != nullptr && T::kPerWord == 2;
        if (!stochastic && rows_suit_vectors<T>(p, rows)) {
          apply_vectors<T>(p, rows, m, t);
        } else {
          apply_lanes<T>(p, rows, m, t);
        }
      }
      if (rows.parts != nullptr) add_score(p, rows, m, t);
    });
  }
}

// Element `index` of the score, once all blocks of its matrix were seen; until then its sum is kept in `totals`.
ZO_HD void score_column(const Kron& p, int64_t index) {
  const int64_t matrix = find_matrix(p.matrices, 4, index);
  const int64_t* fields = p.matrices.table + matrix * p.matrices.fields;
  const int64_t rows = fields[1], start = fields[3], stop = start + (rows + kRowBlock - 1) / kRowBlock;
  const int64_t begin = start > p.first_block ? start : p.first_block;
  const int64_t launch_end = p.first_block + p.block_count, end = stop < launch_end ? stop : launch_end;
  if (begin >= end && !(rows == 0 && p.first_block == 0)) return;
  double total = begin == start ? 0.0 : p.totals[index];
  const float* parts = p.parts + (index - fields[4]);
  for (int64_t b = begin; b < end; ++b) total = add64(total, parts[(b - p.first_block) * p.matrices.widest]);
  if (end < stop) {
    p.totals[index] = total;
    return;
  }
  double weight = 0.0;
  for (int k = 0; k < p.terms; ++k) weight = add64(weight, p.coeffs[k]);
  double expected = multiply64(multiply64(weight, static_cast<double>(rows)), p.a[index]);
  p.score[index] = static_cast<float>(add64(total, -expected));
}

}  // namespace zo::cuda
