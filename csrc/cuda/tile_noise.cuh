// The noise of one seed tile by tile, where a warp has one lane a thread. Host code too.
#pragma once

#include "arguments.h"
#include "device_noise.cuh"

namespace zo::cuda {

// Philox's launch-wide part is kept for the upper half of the block numbers, which hardly ever changes.
struct TileNoise {
  Schedule schedule;
  uint64_t seed;
  uint32_t stream, high;
  Noise noise;

  // `index`: where the first tile will be.
  ZO_HD TileNoise(uint64_t seed_, uint32_t stream_, Noise noise_, uint64_t index)
      : seed(seed_), stream(stream_), high(static_cast<uint32_t>(index >> (noise_ == Noise::kGaussian ? 34 : 39))),
        noise(noise_) {
    load();
  }
  ZO_HD void load() { schedule = zo::cuda::schedule(seed, high, stream); }
  ZO_HD void need(uint32_t wanted) {
    if (wanted == high) return;
    high = wanted;
    load();
  }
  // z of the four elements of `lane` in a tile of 1024.
  ZO_HD void tile(uint64_t tile, uint32_t lane, float (&z)[4]) {
    if (noise == Noise::kGaussian) {
      need(static_cast<uint32_t>(tile >> 24));
      gaussian4(philox(schedule, static_cast<uint32_t>(tile << 8) + lane), z);
    } else {
      need(static_cast<uint32_t>(tile >> 29));
      Words words = philox(schedule, static_cast<uint32_t>(tile >> 5 << 8) + lane);
      uint32_t word = pick(words, tile >> 3 & 3) >> (tile & 7) * 4;
      ZO_UNROLL
      for (int i = 0; i < 4; ++i) z[i] = word >> i & 1 ? 1.0f : -1.0f;
    }
  }
};

}  // namespace zo::cuda
