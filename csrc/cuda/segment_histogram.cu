// segment_histogram: counts in shared memory, added to those of all blocks at the end. Integers, so no order matters.
#include <algorithm>

#include "by_type.cuh"
#include "segment_histogram.cuh"

namespace zo::cuda {
namespace {

constexpr int64_t kPiecesPerBlock = 4;      // on average: how long each segment is, only the device knows
constexpr int64_t kBlocksPerSegment = 512;  // at most

template <class T>
__global__ void __launch_bounds__(kHistogramBlock) histogram(Histogram p, int blocks) {
  __shared__ uint32_t bins[kHistogramBins];
  const int64_t segment = blockIdx.x / blocks;
  const Vectors<T> vectors(p.segments, segment);
  const int64_t count = vectors.count();
  int64_t piece = blockIdx.x % blocks * kHistogramPiece;
  if (piece >= count) return;
  for (int bin = threadIdx.x; bin < kHistogramBins; bin += kHistogramBlock) bins[bin] = 0;
  __syncthreads();
  const Digit digit(p.digit, p.prefixes[segment]);
  for (; piece < count; piece += blocks * kHistogramPiece) {
    const int64_t end = min(count, piece + kHistogramPiece);
#pragma unroll 4
    for (int64_t v = piece + threadIdx.x; v < end; v += kHistogramBlock) {
      vectors.count_vector(p.segments, v, digit, [](uint32_t bin) { atomicAdd(&bins[bin], 1u); });
    }
  }
  __syncthreads();
  unsigned long long* counts = reinterpret_cast<unsigned long long*>(p.counts) + segment * kHistogramBins;
  for (int bin = threadIdx.x; bin < kHistogramBins; bin += kHistogramBlock) {
    if (bins[bin] != 0) atomicAdd(&counts[bin], static_cast<unsigned long long>(bins[bin]));
  }
}

template <class T>
cudaError_t launch(const Histogram& p, cudaStream_t stream) {
  const int64_t segments = p.segments.count;
  if (segments == 0) return cudaSuccess;
  cudaError_t error = cudaMemsetAsync(p.counts, 0, segments * kHistogramBins * sizeof(int64_t), stream);
  if (error != cudaSuccess) return error;
  const int64_t elements = kHistogramPiece * kPiecesPerBlock * Vectors<T>::kLanes;
  const int blocks = static_cast<int>(std::min(p.size / (segments * elements) + 1, kBlocksPerSegment));
  histogram<T><<<static_cast<unsigned>(segments * blocks), kHistogramBlock, 0, stream>>>(p, blocks);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_segment_histogram(const Histogram& args, Type type, cudaStream_t stream) {
  return by_type(type, [&](auto element) { return launch<decltype(element)>(args, stream); });
}

}  // namespace zo::cuda
