// One kernel for all ops of fused_ops.cuh, and its launch over ranges.
#pragma once

#include <algorithm>

#include "by_type.cuh"
#include "fused_ops.cuh"
#include "grid.cuh"

namespace zo::cuda {

constexpr int kFusedBlock = 128;
constexpr int kFusedUnits = kFusedBlock / 32;  // of one block

// The sums of squares of a unit's two tiles: the tree over lanes 64 to 1 apart.
__device__ inline void sum_tiles(const Fused& p, const Span& span, uint32_t unit, double (&squares)[2][kPartLanes]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    double(&lane)[kPartLanes] = squares[half];
#pragma unroll
    for (int width = 16; width > 0; width /= 2) {
#pragma unroll
      for (int j = 0; j < kPartLanes; ++j) lane[j] = add64(lane[j], __shfl_down_sync(0xFFFFFFFFu, lane[j], width));
    }
    int64_t tile = tile_of(p, span, unit, half);
    if (threadIdx.x % 32 == 0 && tile >= 0) {
      p.squares[tile] = add64(add64(lane[0], lane[2]), add64(lane[1], lane[3]));
    }
  }
}

template <class Op, int lanes>
__device__ __forceinline__ void one_unit(const Fused& p, const Span& span, const Op& op, Turn& turn,
                                         uint32_t unit) {
  double squares[2][kPartLanes];
  fused_unit<Op, lanes>(p, span, op, turn, unit, threadIdx.x % 32, squares);
  if constexpr (Op::kSquares) {
    if (p.squares != nullptr) sum_tiles(p, span, unit, squares);
  }
}

// What a block does: a unit a warp, in strides of the grid.
template <class Op>
__device__ __forceinline__ void fused_block(const Fused& p, const Span& span) {
  Op op(p);
  Turn turn(p, span);
  const uint32_t first = blockIdx.x * kFusedUnits + threadIdx.x / 32, stride = gridDim.x * kFusedUnits;
  for (uint32_t unit = span.whole_first + first; unit < span.whole_end; unit += stride) {
    one_unit<Op, kPartLanes>(p, span, op, turn, unit);
  }
  for (uint32_t i = first; i < span.cut_units(); i += stride) {
    one_unit<Op, 1>(p, span, op, turn, span.cut_unit(i));
  }
}

template <class Op>
__global__ void __launch_bounds__(kFusedBlock, Op::kResident) fused(Fused p, Span span) {
  fused_block<Op>(p, span);
}

template <class Op>
cudaError_t launch_fused(const Fused& args, cudaStream_t stream) {
  int resident = 0;
  cudaError_t error = resident_blocks(fused<Op>, kFusedBlock, resident);
  for_spans(args, sizeof(typename Op::Type::Bits), [&](const Fused& part, const Span& span) {
    if (error != cudaSuccess) return;
    uint32_t blocks = std::min<uint32_t>((span.units + kFusedUnits - 1) / kFusedUnits, resident);
    fused<Op><<<blocks, kFusedBlock, 0, stream>>>(part, span);
    error = cudaGetLastError();
  });
  return error;
}

}  // namespace zo::cuda
