// Rows of matrices start and end anywhere in a tile. A window holds the whole tiles around the row in work, and the
// next row goes on where the last one ended, so that each number is drawn once.
#pragma once

#include "tile_noise.h"

namespace zo {
inline namespace ZO_ISA {

using cpu::Key;
using cpu::MatrixRows;
using cpu::Scratch;

// The random 16 bits of stochastic rounding, as words.
template <class V>
class TileRounding {
 public:
  static constexpr int kSize = 2 * kTile;

  explicit TileRounding(const Key* key) : key_(key) {}

  __attribute__((noinline)) void draw(uint64_t tile, float* bits, int64_t, Ahead, Ahead) {
    alignas(64) uint32_t words[kWordsPerTile];
    PhiloxTile<V, false>::run(words, *key_, tile * 256, table::STREAM_ROUNDING, nullptr, 0);
    for (int row = 0; row < 8; ++row) {
      for (int lane = 0; lane < 256; lane += V::kLanes) {
        V::store(bits + row * 256 + lane, V::floats(rounding_bits<V>(words, row, lane)));
      }
    }
  }

 private:
  const Key* key_;
};

template <class Source>
class Window {
 public:
  // `memory` holds `count` strings of numbers of `capacity` floats.
  Window(Source source, float* memory, int64_t count, int64_t capacity)
      : source_(source), memory_(memory), count_(count), capacity_(capacity) {}

  // Have the numbers of elements index .. index + count - 1, of which each takes `size` bytes at `data`.
  void cover(uint64_t index, int64_t count, const void* data, int size) {
    const uint64_t first = index / kSize, last = (index + static_cast<uint64_t>(count) - 1) / kSize + 1;
    if (first < first_ || first >= last_) first_ = last_ = first;
    if ((last - first_) * kSize > static_cast<uint64_t>(capacity_)) {
      const uint64_t held = last_ - first;
      for (int64_t k = 0; k < count_; ++k) {
        float* numbers = memory_ + k * capacity_;
        __builtin_memmove(numbers, numbers + (first - first_) * kSize, held * kSize * sizeof(float));
      }
      first_ = first;
    }
    for (; last_ < last; ++last_) {
      const char* place = static_cast<const char*>(data) + static_cast<int64_t>(last_ * kSize - index) * size;
      source_.draw(last_, memory_ + (last_ - first_) * kSize, capacity_, {place, 4 * size}, {nullptr, 0});
    }
  }

  const float* at(uint64_t index, int64_t k = 0) const { return memory_ + k * capacity_ + (index - first_ * kSize); }

 private:
  static constexpr uint64_t kSize = Source::kSize;
  Source source_;
  float* memory_;
  int64_t count_, capacity_;
  uint64_t first_ = 0, last_ = 0;  // tiles
};

// Store one vector, with the rounding bits at `random` unless that is null.
template <class M, class T>
ZO_HD void store_at(T* out, typename M::F value, const float* random) {
  if constexpr (sizeof(T) == 2) {
    if (random) return InOrder<M, T>::store(out, value, M::bits(M::load(random)));
  }
  InOrder<M, T>::store(out, value);
}

}  // namespace ZO_ISA
}  // namespace zo
