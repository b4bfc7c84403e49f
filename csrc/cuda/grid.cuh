// How many blocks a kernel that strides over its work should have.
#pragma once

#include "launch.h"

namespace zo::cuda {

// The blocks of `threads` threads that the current device holds at once.
template <class Kernel>
cudaError_t resident_blocks(Kernel* kernel, int threads, int& blocks, size_t shared = 0) {
  int device, processors, each;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared);
  if (error == cudaSuccess) blocks = processors * each;
  return error;
}

}  // namespace zo::cuda
