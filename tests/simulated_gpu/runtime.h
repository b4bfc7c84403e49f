// What CUDA C++ needs to be host code: included before a kernel file whose launches and dynamic shared memory were
// rewritten by build.py.
//
// The threads of a block are fibers that take turns in an order that changes, so that a missing barrier shows as other
// bits sooner or later. Dynamic shared memory begins as NaN.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __shared__
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)

namespace simulated {

constexpr int kWarp = 32;
constexpr int kMultiprocessors = 3, kResidentBlocks = 2;     // few, so that kernels stride over their work
constexpr int kSharedMemory = 227 << 10, kOrdinaryShared = 48 << 10;  // bytes a block can have, and without asking

extern uint3 thread_index, block_index;
extern dim3 grid_size, block_size;
extern unsigned char shared_memory[kSharedMemory];

// Enqueues a grid, or refuses it as a GPU would. `asked`: bytes of shared memory that the kernel's attribute allows.
void launch(unsigned blocks, int threads, size_t shared, cudaStream_t stream, std::function<void()> body);

void barrier();
int lane();
// The bytes that lane `source` of the warp gives; all lanes of the warp must come here.
void exchange(void* value, size_t size, int source);

template <class T>
T from_lane(T value, int source) {
  exchange(&value, sizeof(T), source);
  return value;
}

cudaError_t allow_shared(int bytes);

}  // namespace simulated

#define threadIdx simulated::thread_index
#define blockIdx simulated::block_index
#define blockDim simulated::block_size
#define gridDim simulated::grid_size

inline void __syncthreads() { simulated::barrier(); }

template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int source = simulated::lane() + delta;
  return simulated::from_lane(value, source < simulated::kWarp ? source : simulated::lane());
}

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return simulated::from_lane(value, source % simulated::kWarp);
}

template <class T, class Value>
T atomicAdd(T* to, Value value) {
  T before = *to;
  *to = before + static_cast<T>(value);
  return before;
}

inline float __fadd_rn(float a, float b) { return a + b; }

using std::max;
using std::min;

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = simulated::kResidentBlocks;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int value) {
  return simulated::allow_shared(value);
}
