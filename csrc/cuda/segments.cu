// segment_stats, segment_dot and segment_dot_noise.
//
// The order of a segment's sum has two levels: tiles of 1024 elements, then 256 lanes of tiles (lane l adds the tiles
// l, l + 256, ...) and a tree over the lanes. Lanes of tiles are independent, so they are the work of the first kernel,
// which leaves 256 results a segment; the second does the trees. Nothing depends on how many tiles the segments have
// together, so their lengths need not be known on the host.
#include "by_type.cuh"
#include "segments.cuh"

namespace zo::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kBlock = kWarps * kWarp;
constexpr int kBlocksPerSegment = 128;
constexpr int64_t kDeepTiles = 2 * table::LANES;

// Lanes `width`, `width / 2`, ..., 1 apart; the result is thread 0's.
__device__ Dot warp_tree(Dot value) {
  for (int width = kWarp / 2; width > 0; width /= 2) {
    value.sum = add64(value.sum, __shfl_down_sync(0xFFFFFFFFu, value.sum, width));
  }
  return value;
}

__device__ Stats warp_tree(Stats value) {
  for (int width = kWarp / 2; width > 0; width /= 2) {
    Stats other;
    other.sum = __shfl_down_sync(0xFFFFFFFFu, value.sum, width);
    other.squares = __shfl_down_sync(0xFFFFFFFFu, value.squares, width);
    other.least = __shfl_down_sync(0xFFFFFFFFu, value.least, width);
    other.most = __shfl_down_sync(0xFFFFFFFFu, value.most, width);
    value.append(other);
  }
  return value;
}

// One block does some lanes of tiles of one segment. In a long segment 8 warps share a lane, each taking the next of
// its tiles, and their results are added in order; in a short one each warp has its own lane, and most blocks have none.
template <class Source>
__global__ void __launch_bounds__(kBlock) lanes(Segments args, Source source, double* workspace) {
  using Result = typename Source::Result;
  __shared__ double result[2][kWarps][Result::kDoubles];
  const int64_t segment = blockIdx.x / kBlocksPerSegment;
  const int64_t start = args.starts[segment], length = args.lengths[segment];
  const int64_t tiles = (length + kTile - 1) / kTile;
  const int depth = tiles > kDeepTiles ? 8 : 1;  // warps that share a lane
  const int warp = threadIdx.x / kWarp, thread = threadIdx.x % kWarp;
  const int lane = static_cast<int>(blockIdx.x % kBlocksPerSegment) * (kWarps / depth) + warp / depth;
  if (lane - warp / depth >= static_cast<int>(table::LANES)) return;  // the whole block has none

  Result total;
  int side = 0;
  // All warps of a block take part in every step; the lanes of a block differ by one tile at most.
  for (int64_t first = 0; first < tiles; first += table::LANES * depth, side ^= 1) {
    const int64_t tile = first + (warp % depth) * table::LANES + lane;
    Result mine;
    if (tile < tiles) {
      mine = warp_tree(source(start + tile * kTile, min(length - tile * kTile, int64_t{kTile}), thread));
    }
    if (thread == 0) mine.store(result[side][warp]);
    __syncthreads();  // one is enough: the next step writes to the other side
    if (thread == 0 && warp % depth == 0) {
      for (int i = 0; i < depth; ++i) total.append(Result::load(result[side][warp + i]));
    }
  }
  if (thread == 0 && warp % depth == 0) {
    total.store(workspace + (segment * table::LANES + lane) * Result::kDoubles);
  }
}

// One block of 256 threads does the tree over a segment's lanes.
template <class Result>
__global__ void __launch_bounds__(table::LANES) trees(const double* workspace, double* out) {
  __shared__ double upper[table::LANES][Result::kDoubles];
  const int lane = threadIdx.x;
  Result value = Result::load(workspace + (int64_t{blockIdx.x} * table::LANES + lane) * Result::kDoubles);
  for (int width = table::LANES / 2; width >= kWarp; width /= 2) {
    if (lane >= width && lane < 2 * width) value.store(upper[lane]);
    __syncthreads();
    if (lane < width) value.append(Result::load(upper[lane + width]));
  }
  if (lane >= kWarp) return;
  value = warp_tree(value);
  if (lane == 0) value.store(out + int64_t{blockIdx.x} * Result::kDoubles);
}

constexpr int kGroup = 8;                          // lanes of tiles that a block of tile_lanes has: 64 bytes of a row
constexpr int kDeep = table::LANES * table::LANES;  // tiles that one step of it takes of all lanes, 256 a lane

// Lane l adds the tiles l, l + 256, ... in order. All threads bring tiles from memory, a row of lanes each time, and one
// thread a lane adds them up.
__global__ void __launch_bounds__(table::LANES) tile_lanes(const double* tiles, int64_t count, double* lanes) {
  __shared__ double brought[table::LANES][kGroup + 1];
  const int column = threadIdx.x % kGroup, row = threadIdx.x / kGroup, lane = blockIdx.x * kGroup + column;
  double sum = 0.0;
  for (int64_t first = 0; first < count; first += kDeep) {
#pragma unroll
    for (int r = row; r < static_cast<int>(table::LANES); r += table::LANES / kGroup) {
      int64_t tile = first + r * static_cast<int64_t>(table::LANES) + lane;
      brought[r][column] = tile < count ? tiles[tile] : 0.0;
    }
    __syncthreads();
    if (threadIdx.x < kGroup) {
#pragma unroll 16
      for (int r = 0; r < static_cast<int>(table::LANES); ++r) sum = add64(sum, brought[r][column]);
    }
    __syncthreads();
  }
  if (threadIdx.x < kGroup) lanes[lane] = sum;
}

template <class Source>
cudaError_t launch(const Segments& args, const Factor& factor, double* workspace, double* out, cudaStream_t stream) {
  if (args.count == 0) return cudaSuccess;
  const unsigned segments = static_cast<unsigned>(args.count);
  lanes<<<segments * kBlocksPerSegment, kBlock, 0, stream>>>(args, Source(args, factor), workspace);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  trees<typename Source::Result><<<segments, table::LANES, 0, stream>>>(workspace, out);
  return cudaGetLastError();
}

template <class T>
cudaError_t dot(const Segments& args, const Factor& factor, double* workspace, double* out, cudaStream_t stream) {
  if (factor.y == nullptr) {
    return factor.noise == Noise::kGaussian
               ? launch<NoiseSource<T, Noise::kGaussian>>(args, factor, workspace, out, stream)
               : launch<NoiseSource<T, Noise::kRademacher>>(args, factor, workspace, out, stream);
  }
  return by_type(factor.y_type, [&](auto element) {
    return launch<DotSource<T, decltype(element)>>(args, factor, workspace, out, stream);
  });
}

}  // namespace

cudaError_t launch_tile_sum(const double* tiles, int64_t count, double* lanes, double* out, cudaStream_t stream) {
  tile_lanes<<<table::LANES / kGroup, table::LANES, 0, stream>>>(tiles, count, lanes);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  trees<Dot><<<1, table::LANES, 0, stream>>>(lanes, out);
  return cudaGetLastError();
}

int64_t stats_workspace(int64_t segments) { return segments * table::LANES * Stats::kDoubles; }
int64_t dot_workspace(int64_t segments) { return segments * table::LANES * Dot::kDoubles; }

cudaError_t launch_segment_stats(const Segments& args, Type type, double* workspace, double* out,
                                 cudaStream_t stream) {
  return by_type(type, [&](auto element) {
    return launch<StatsSource<decltype(element)>>(args, {}, workspace, out, stream);
  });
}

cudaError_t launch_segment_dot(const Segments& args, Type type, const Factor& factor, double* workspace,
                               double* out, cudaStream_t stream) {
  return by_type(type, [&](auto element) { return dot<decltype(element)>(args, factor, workspace, out, stream); });
}

}  // namespace zo::cuda
