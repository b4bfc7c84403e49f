// segment_noise_fill, segment_histogram and mask_below with their threads as loops.
#include "mask_below.cuh"
#include "segment_fill.cuh"
#include "segment_histogram.cuh"

namespace {

using namespace zo::cuda;
namespace table = zo::table;

template <class T>
void fill(const SegmentFill& p) {
  for (int64_t s = 0; s < p.count; ++s) {
    TileNoise noise(static_cast<uint64_t>(*p.seed), p.stream, p.noise, static_cast<uint64_t>(p.indices[s]));
    for (int64_t tile = 0; tile < fill_tiles(p, s); ++tile) {
      for (uint32_t lane = 0; lane < table::LANES; ++lane) fill_tile<T>(p, s, tile, lane, noise);
    }
  }
}

template <class T>
void histogram(const Histogram& p) {
  for (int64_t i = 0; i < p.segments.count * kHistogramBins; ++i) p.counts[i] = 0;
  for (int64_t s = 0; s < p.segments.count; ++s) {
    const Vectors<T> vectors(p.segments, s);
    const Digit digit(p.digit, p.prefixes[s]);
    int64_t* counts = p.counts + s * kHistogramBins;
    for (int64_t v = 0; v < vectors.count(); ++v) {
      vectors.count_vector(p.segments, v, digit, [counts](uint32_t bin) { ++counts[bin]; });
    }
  }
}

template <class T>
void mask(uint8_t* bits, const void* x, const float* thresholds, int64_t count) {
  const bool aligned = reinterpret_cast<uint64_t>(x) % sizeof(Vector) == 0;
  for (int64_t byte = 0; byte < (count + 7) / 8; ++byte) mask_byte<T>(bits, x, thresholds, count, aligned, byte);
}

}  // namespace

extern "C" int zo_segment_fill(const SegmentFill* args, int type) {
  if (type == 0) fill<Float32>(*args);
  if (type == 1) fill<BFloat16>(*args);
  if (type == 2) fill<Float16>(*args);
  return 0;
}

extern "C" int zo_segment_histogram(const Histogram* args, int type) {
  if (type == 0) histogram<Float32>(*args);
  if (type == 1) histogram<BFloat16>(*args);
  if (type == 2) histogram<Float16>(*args);
  return 0;
}

extern "C" int zo_mask_below(uint8_t* bits, const void* x, int type, const float* thresholds, int count) {
  if (type == 0) mask<Float32>(bits, x, thresholds, count);
  if (type == 1) mask<BFloat16>(bits, x, thresholds, count);
  if (type == 2) mask<Float16>(bits, x, thresholds, count);
  return 0;
}
