// mask_below_.
#include <algorithm>

#include "by_type.cuh"
#include "grid.cuh"
#include "mask_below.cuh"

namespace zo::cuda {
namespace {

constexpr int kBlock = 256;

template <class T>
__global__ void __launch_bounds__(kBlock) mask_bytes(uint8_t* bits, const void* x, const float* thresholds,
                                                     int64_t count, bool aligned) {
  const int64_t bytes = (count + 7) / 8, stride = int64_t{gridDim.x} * kBlock;
  for (int64_t byte = int64_t{blockIdx.x} * kBlock + threadIdx.x; byte < bytes; byte += stride) {
    mask_byte<T>(bits, x, thresholds, count, aligned, byte);
  }
}

template <class T>
cudaError_t launch(uint8_t* bits, const void* x, const float* thresholds, int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  int resident = 0;
  cudaError_t error = resident_blocks(mask_bytes<T>, kBlock, resident);
  if (error != cudaSuccess) return error;
  const int64_t blocks = ((count + 7) / 8 + kBlock - 1) / kBlock;
  const bool aligned = reinterpret_cast<uint64_t>(x) % sizeof(Vector) == 0;
  mask_bytes<T><<<static_cast<unsigned>(std::min<int64_t>(blocks, resident)), kBlock, 0, stream>>>(
      bits, x, thresholds, count, aligned);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_mask_below(uint8_t* bits, const void* x, Type type, const float* thresholds, int64_t count,
                              cudaStream_t stream) {
  return by_type(type, [&](auto element) { return launch<decltype(element)>(bits, x, thresholds, count, stream); });
}

}  // namespace zo::cuda
