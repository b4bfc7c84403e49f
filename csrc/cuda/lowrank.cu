// lowrank_add_ and lowrank_add_out.
#include "by_type.cuh"
#include "lowrank.cuh"

namespace zo::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kTilesPerBlock = 8;  // of columns, so that looking up the matrix counts for little

template <class T>
__global__ void __launch_bounds__(kBlock, 2) lowrank_add(LowRank p, int groups) {
  __shared__ Vector memory[kLowRankShared / 4];
  float* shared = reinterpret_cast<float*>(memory);
  const RowBlock block = row_block(p.matrices, blockIdx.x / groups);
  const int thread = threadIdx.x;
  for (int column = static_cast<int>(blockIdx.x % groups) * kTileColumns; column < block.columns;
       column += groups * kTileColumns) {
    const LowRankTile tile(p, block, column);
    float sum[kPatchRows][kPatchColumns] = {};
    for (int k = 0; k < p.rank; k += kRankStep) {
      const int depth = min(kRankStep, p.rank - k);
      __syncthreads();  // the factors before these were used
      bring_factors(p, tile, k, depth, thread, shared);
      __syncthreads();
      multiply_factors(shared, depth, thread, sum);
    }
    finish_patch<T>(p, tile, thread, sum);
  }
}

template <class T>
cudaError_t launch(const LowRank& p, cudaStream_t stream) {
  const int64_t tiles = (p.matrices.widest + kTileColumns - 1) / kTileColumns;
  const int64_t groups = (tiles + kTilesPerBlock - 1) / kTilesPerBlock;
  if (p.matrices.blocks * groups == 0) return cudaSuccess;
  lowrank_add<T><<<static_cast<unsigned>(p.matrices.blocks * groups), kBlock, 0, stream>>>(p, static_cast<int>(groups));
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_lowrank_add(const LowRank& args, Type type, cudaStream_t stream) {
  return by_type(type, [&](auto element) { return launch<decltype(element)>(args, stream); });
}

}  // namespace zo::cuda
