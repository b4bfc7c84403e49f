// What a block of 256 threads does in lowrank_add_: 64 rows by 128 columns of a matrix at a time. Host code too.
//
// A thread sums 8 rows by 4 columns in registers, each in the order of the rank, with the factors transposed in shared
// memory: 3 loads there for 32 fused multiply-adds. A warp has 8 rows, so what it reads and writes of x is contiguous.
#pragma once

#include "matrices.cuh"
#include "memory.cuh"

namespace zo::cuda {

constexpr int kPatchRows = 8, kPatchColumns = 4;  // of a thread
constexpr int kTileColumns = 128;
constexpr int kRankStep = 16;               // of the rank in shared memory at once
constexpr int kLeftStride = kRowBlock + 4;  // the 4 spread what a transposed store writes over the banks
constexpr int kRightStride = kTileColumns + 4;
constexpr int kLowRankShared = kRankStep * (kLeftStride + kRightStride);  // floats

struct LowRankTile {
  RowBlock rows;
  int32_t column;     // the first
  int32_t width;      // columns inside the matrix, at most 128
  const float *left, *right;  // of the first row and of the first column

  ZO_HD LowRankTile(const LowRank& p, const RowBlock& block, int32_t first) : rows(block), column(first) {
    width = block.columns - first < kTileColumns ? block.columns - first : kTileColumns;
    left = p.left + block.factors[0] + block.first * p.rank;
    right = p.right + block.factors[1] + static_cast<int64_t>(first) * p.rank;
  }
};

// Brings `depth` factors from `first` on, with zeros behind the matrix's ends.
ZO_HD void bring_factors(const LowRank& p, const LowRankTile& tile, int first, int depth, int thread, float* shared) {
  float* rights = shared + kRankStep * kLeftStride;
  for (int e = thread; e < kRowBlock * depth; e += 256) {
    const int row = e / depth, k = e % depth;
    shared[k * kLeftStride + row] = row < tile.rows.rows ? tile.left[row * p.rank + first + k] : 0.0f;
  }
  for (int e = thread; e < kTileColumns * depth; e += 256) {
    const int column = e / depth, k = e % depth;
    rights[k * kRightStride + column] = column < tile.width ? tile.right[column * p.rank + first + k] : 0.0f;
  }
}

ZO_HD void load4(const float* from, float* value) {
  Vector v = *reinterpret_cast<const Vector*>(from);
  ZO_UNROLL
  for (int j = 0; j < 4; ++j) value[j] = bits_float(v.word[j]);
}

ZO_HD void multiply_factors(const float* shared, int depth, int thread, float (&sum)[kPatchRows][kPatchColumns]) {
  const float* lefts = shared + thread / 32 * kPatchRows;
  const float* rights = shared + kRankStep * kLeftStride + thread % 32 * kPatchColumns;
#pragma unroll 4
  for (int k = 0; k < depth; ++k) {
    float l[kPatchRows], r[kPatchColumns];
    load4(lefts + k * kLeftStride, l);
    load4(lefts + k * kLeftStride + 4, l + 4);
    load4(rights + k * kRightStride, r);
    ZO_UNROLL
    for (int i = 0; i < kPatchRows; ++i) {
      ZO_UNROLL
      for (int j = 0; j < kPatchColumns; ++j) sum[i][j] = fma32(l[i], r[j], sum[i][j]);
    }
  }
}

// The 16 rounding bits of the element at `index`. One call for each: its other seven elements belong to other threads.
struct ElementRandom {
  Schedule schedule;
  uint32_t high;

  ZO_HD ElementRandom(const LowRank& p, uint64_t index) : high(static_cast<uint32_t>(index >> 35)) { load(p); }
  ZO_HD void load(const LowRank& p) {
    if (p.rounding_seed == nullptr) return;
    schedule = zo::cuda::schedule(static_cast<uint64_t>(*p.rounding_seed), high, table::STREAM_ROUNDING);
  }
  ZO_HD uint32_t operator()(const LowRank& p, uint64_t index) {
    const Place at = place<kRoundingLog2Parts>(index);
    if (static_cast<uint32_t>(at.block >> 32) != high) {
      high = static_cast<uint32_t>(at.block >> 32);
      load(p);
    }
    return pick(philox(schedule, static_cast<uint32_t>(at.block)), at.part >> 1) >> (16 * (at.part & 1)) & 0xFFFF;
  }
};

// Two values, or one, as a word.
template <class T>
ZO_HD uint32_t round_word(const LowRank& p, ElementRandom& random, uint64_t index, float (&value)[2]) {
  if constexpr (T::kPerWord == 2) {
    if (p.rounding_seed != nullptr) {
      uint32_t bits[2] = {random(p, index), random(p, index + 1)};
      T::template quiet<2>(value);
      return T::pack_stochastic(value, bits);
    }
  }
  return T::pack(value);
}

// Four neighbouring elements as they lie in memory.
template <class T>
struct alignas(16 / T::kPerWord) PatchRow {
  uint32_t word[kPatchColumns / T::kPerWord];
};

// x = keep x + coeff sum for the thread's patch; all rows are loaded before the first of them is stored.
template <class T>
ZO_HD void finish_patch(const LowRank& p, const LowRankTile& tile, int thread,
                        const float (&sum)[kPatchRows][kPatchColumns]) {
  using Bits = typename T::Bits;
  const int row = thread / 32 * kPatchRows, column = thread % 32 * kPatchColumns;
  const int64_t stride = tile.rows.columns;
  const int64_t first = tile.rows.start + row * stride + tile.column + column;
  const Bits* from = static_cast<const Bits*>(p.x) + first;
  Bits* to = static_cast<Bits*>(p.out) + first;
  const uint64_t index = p.offset + static_cast<uint64_t>(first);
  const float coefficient = *p.coeff, keep = p.keep == nullptr ? 1.0f : *p.keep;
  const int rows = tile.rows.rows - row;  // inside the matrix
  const bool vectors = (reinterpret_cast<uint64_t>(from) | reinterpret_cast<uint64_t>(to)) % sizeof(PatchRow<T>) == 0 &&
                       stride % kPatchColumns == 0 && column + kPatchColumns <= tile.width;
  PatchRow<T> data[kPatchRows];
  ZO_UNROLL
  for (int i = 0; i < kPatchRows; ++i) {
    data[i] = {};
    if (i >= rows) continue;
    if (vectors) {
      data[i] = *reinterpret_cast<const PatchRow<T>*>(from + i * stride);
      continue;
    }
    ZO_UNROLL
    for (int j = 0; j < kPatchColumns; ++j) {
      uint32_t bits = column + j < tile.width ? from[i * stride + j] : Bits{0};
      data[i].word[j / T::kPerWord] |= bits << (32 / T::kPerWord * (j % T::kPerWord));
    }
  }
  ElementRandom random(p, index);
  ZO_UNROLL
  for (int i = 0; i < kPatchRows; ++i) {
    if (i >= rows) continue;
    ZO_UNROLL
    for (int w = 0; w < kPatchColumns / T::kPerWord; ++w) {
      const int j = w * T::kPerWord;
      float value[2];
      T::unpack(data[i].word[w], value);
      ZO_UNROLL
      for (int l = 0; l < T::kPerWord; ++l) {
        value[l] = fma32(coefficient, sum[i][j + l], Scalar::mul(value[l], keep));
      }
      data[i].word[w] = round_word<T>(p, random, index + static_cast<uint64_t>(i * stride + j), value);
    }
    if (vectors) {
      *reinterpret_cast<PatchRow<T>*>(to + i * stride) = data[i];
      continue;
    }
    ZO_UNROLL
    for (int j = 0; j < kPatchColumns; ++j) {
      uint32_t bits = data[i].word[j / T::kPerWord] >> (32 / T::kPerWord * (j % T::kPerWord));
      if (column + j < tile.width) to[i * stride + j] = static_cast<Bits>(bits);
    }
  }
}

}  // namespace zo::cuda
