// One kernel for all configurations of elementwise.cuh, and its launch over ranges.
#pragma once

#include <algorithm>

#include "by_type.cuh"
#include "elementwise.cuh"
#include "grid.cuh"

namespace zo::cuda {

constexpr int kBlock = 128;

// Blocks that must fit on a multiprocessor together, which caps the registers at 168, 128, 96 or 80: as many as each kind
// of configuration takes without spilling.
template <class C>
constexpr int kResident = C::kTerms == 0                       ? 3
                          : C::kStochastic && !C::kGaussian ? 3
                          : C::kStochastic || !C::kGaussian ? 4
                          : C::kTerms == 2                  ? 5
                                                            : 6;

// The grid fills the device once and strides over the units: what all units share is then computed once a thread.
template <class C>
__global__ void __launch_bounds__(kBlock, kResident<C>) elementwise(AddNoise p, Range<C> range) {
  constexpr uint32_t kUnits = kBlock / C::kThreads;  // of one block
  Shared<C> shared(p, range);
  for (uint32_t unit = range.whole_first + blockIdx.x * kUnits + threadIdx.x / C::kThreads; unit < range.whole_end;
       unit += gridDim.x * kUnits) {
    whole_unit<C>(p, range, shared, unit, threadIdx.x % C::kThreads);
  }
  for (uint32_t i = blockIdx.x; i < range.cut_units(); i += gridDim.x) {
    for (uint32_t lane = threadIdx.x; lane < table::LANES; lane += kBlock) {
      cut_unit<C>(p, range, range.cut_unit(i), lane);
    }
  }
}

template <class C>
cudaError_t launch(const AddNoise& args, cudaStream_t stream) {
  int resident;
  cudaError_t error = resident_blocks(elementwise<C>, kBlock, resident);
  for_ranges<C>(args, [&](const AddNoise& part, const Range<C>& range) {
    if (error != cudaSuccess) return;
    uint32_t whole = ((range.whole_end - range.whole_first) * C::kThreads + kBlock - 1) / kBlock;
    uint32_t blocks = std::min<uint32_t>(std::max(whole, range.cut_units()), resident);
    elementwise<C><<<blocks, kBlock, 0, stream>>>(part, range);
    error = cudaGetLastError();
  });
  return error;
}

}  // namespace zo::cuda
