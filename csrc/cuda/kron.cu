// kron_rows_, kron_rows_out and kron_score.
//
// Blocks of rows leave their share of the score in a workspace, and a second kernel adds these up in order. So that the
// workspace stays small, blocks are launched in groups, each followed by its sums.
#include <algorithm>

#include "by_type.cuh"
#include "grid.cuh"
#include "kron.cuh"

namespace zo::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kPartFloats = int64_t{1} << 26;  // of the workspace, if a block is not larger
// Floats of noise in shared memory: three blocks fit on a multiprocessor of an H100, or two for wider rows.
constexpr int32_t kCapacity = 14336;
constexpr int32_t kLargeCapacity = 22528;

// The threads of a block.
struct Crew {
  template <class Work>
  __device__ void each(const Work& work) {
    work(threadIdx.x);
    __syncthreads();
  }
  // The halving tree over each item's 256 lanes, a warp for each item; one thread stores the sum.
  template <class Store>
  __device__ void trees(int count, const float* lanes, const Store& store) {
    const int thread = threadIdx.x % kWarp;
    for (int item = threadIdx.x / kWarp; item < count; item += kCrew / kWarp) {
      const float* lane = lanes + item * kCrew + thread;
      float a = __fadd_rn(__fadd_rn(lane[0 * kWarp], lane[4 * kWarp]), __fadd_rn(lane[2 * kWarp], lane[6 * kWarp]));
      float b = __fadd_rn(__fadd_rn(lane[1 * kWarp], lane[5 * kWarp]), __fadd_rn(lane[3 * kWarp], lane[7 * kWarp]));
      float sum = __fadd_rn(a, b);
#pragma unroll
      for (int width = kWarp / 2; width > 0; width /= 2) {
        sum = __fadd_rn(sum, __shfl_down_sync(0xFFFFFFFFu, sum, width));
      }
      if (thread == 0) store(item, sum);
    }
    __syncthreads();
  }
};

template <class T>
__global__ void __launch_bounds__(kCrew, 3) kron_rows(Kron p) {
  extern __shared__ Vector memory[];
  Crew crew;
  kron_block<T>(p, blockIdx.x, reinterpret_cast<float*>(memory), crew);
}

__global__ void __launch_bounds__(kCrew) kron_score(Kron p) {
  const int64_t index = int64_t{blockIdx.x} * kCrew + threadIdx.x;
  if (index < p.columns) score_column(p, index);
}

template <class T>
cudaError_t launch(Kron p, cudaStream_t stream) {
  int device, most;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const int64_t room = most / static_cast<int64_t>(sizeof(float)) - kron_shared(p.terms, 0);
  const int64_t wanted = p.matrices.widest * p.terms;
  const int32_t large = wanted > kCapacity && wanted <= kLargeCapacity ? kLargeCapacity : kCapacity;
  p.capacity = static_cast<int32_t>(std::min<int64_t>(large, room));
  const size_t bytes = kron_shared(p.terms, p.capacity) * sizeof(float);
  error = cudaFuncSetAttribute(kron_rows<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  const int64_t step = p.parts == nullptr ? p.matrices.blocks : p.block_count;
  p.first_block = 0;
  do {  // once at least: a score without rows is 0
    p.block_count = std::min(step, p.matrices.blocks - p.first_block);
    if (error == cudaSuccess && p.block_count > 0) {
      kron_rows<T><<<static_cast<unsigned>(p.block_count), kCrew, bytes, stream>>>(p);
      error = cudaGetLastError();
    }
    if (error == cudaSuccess && p.parts != nullptr && p.columns > 0) {
      kron_score<<<static_cast<unsigned>((p.columns + kCrew - 1) / kCrew), kCrew, 0, stream>>>(p);
      error = cudaGetLastError();
    }
    p.first_block += step;
  } while (error == cudaSuccess && p.first_block < p.matrices.blocks);
  return error;
}

}  // namespace

int64_t kron_score_blocks(int64_t blocks, int64_t widest) {
  return std::max<int64_t>(1, std::min(blocks, kPartFloats / std::max<int64_t>(1, widest)));
}

cudaError_t launch_kron(const Kron& args, Type type, cudaStream_t stream) {
  if (args.x == nullptr) return launch<Float32>(args, stream);
  return by_type(type, [&](auto element) { return launch<decltype(element)>(args, stream); });
}

}  // namespace zo::cuda
