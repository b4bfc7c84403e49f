// What one thread of segment_noise_fill does: its lane in one tile of the arena, as far as the segment reaches into it.
// Host code too.
#pragma once

#include "memory.cuh"
#include "tile_noise.cuh"

namespace zo::cuda {

// `tile` counts from the one that holds the segment's first index.
template <class T>
ZO_HD void fill_tile(const SegmentFill& p, int64_t segment, int64_t tile, uint32_t lane, TileNoise& noise) {
  const uint64_t index = static_cast<uint64_t>(p.indices[segment]);
  float z[4];
  noise.tile((index >> 10) + static_cast<uint64_t>(tile), lane, z);
  const int64_t first = tile * 1024 + lane - static_cast<int64_t>(index & 1023);
  ZO_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t n = first + i * static_cast<int64_t>(table::LANES);
    const float value[2] = {z[i], 0.0f};
    if (n >= 0 && n < p.lengths[segment]) store_one<T>(p.out, p.starts[segment] + n, T::pack(value));
  }
}

// Tiles of the arena that a segment reaches into.
ZO_HD int64_t fill_tiles(const SegmentFill& p, int64_t segment) {
  if (p.lengths[segment] == 0) return 0;
  return ((p.indices[segment] & 1023) + p.lengths[segment] + 1023) >> 10;
}

}  // namespace zo::cuda
