// segment_noise_fill_.
#include <algorithm>

#include "by_type.cuh"
#include "segment_fill.cuh"

namespace zo::cuda {
namespace {

constexpr int kBlock = table::LANES;
constexpr int64_t kTilesPerBlock = 4;    // on average: how long each segment is, only the device knows
constexpr int64_t kBlocksPerSegment = 64;  // at most

template <class T>
__global__ void __launch_bounds__(kBlock) segment_fill(SegmentFill p, int blocks) {
  const int64_t segment = blockIdx.x / blocks, tiles = fill_tiles(p, segment);
  int64_t tile = blockIdx.x % blocks;
  if (tile >= tiles) return;
  TileNoise noise(static_cast<uint64_t>(*p.seed), p.stream, p.noise, static_cast<uint64_t>(p.indices[segment]));
  for (; tile < tiles; tile += blocks) fill_tile<T>(p, segment, tile, threadIdx.x, noise);
}

template <class T>
cudaError_t launch(const SegmentFill& p, cudaStream_t stream) {
  if (p.count == 0) return cudaSuccess;
  const int64_t wanted = p.size / (p.count * 1024 * kTilesPerBlock) + 1;
  const int blocks = static_cast<int>(std::min(wanted, kBlocksPerSegment));
  segment_fill<T><<<static_cast<unsigned>(p.count * blocks), kBlock, 0, stream>>>(p, blocks);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_segment_fill(const SegmentFill& args, Type type, cudaStream_t stream) {
  return by_type(type, [&](auto element) { return launch<decltype(element)>(args, stream); });
}

}  // namespace zo::cuda
