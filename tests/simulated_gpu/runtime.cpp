// The simulated GPU's side of the CUDA runtime: blocks one after the other, their threads as fibers.
#include "runtime.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "queue.h"

extern "C" void simulated_switch(void** from, void* to);

// Saves what a call has to keep (System V, x86-64 and AArch64) and the stack pointer, and goes on with another stack.
#if defined(__x86_64__)
asm(R"(
.text
.globl simulated_switch
simulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#error "the simulated GPU switches stacks on x86-64 alone"
#endif

namespace simulated {

uint3 thread_index, block_index;
dim3 grid_size, block_size;
alignas(128) unsigned char shared_memory[kSharedMemory];

namespace {

enum class Status { kReady, kAtBarrier, kInWarp, kDone };

struct Fiber {
  std::vector<char> stack = std::vector<char>(128 << 10);
  void* top = nullptr;
  Status status = Status::kDone;
  unsigned char given[2][8];  // of two exchanges: a lane may be one ahead
  int side = 0;
};

constexpr int kMostThreads = 1024;
std::vector<Fiber> fibers(kMostThreads);
void* scheduler;
int current;
const std::function<void()>* body;
std::mt19937 chance(1);
cudaError_t error = cudaSuccess;
int allowed_shared = kOrdinaryShared;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "simulated GPU: block %u: %s\n", block_index.x, what);
  std::abort();
}

void pause(Status status) {
  const int me = current;
  fibers[me].status = status;
  simulated_switch(&fibers[me].top, scheduler);
}

void begin() {
  (*body)();
  pause(Status::kDone);
}

void prepare(Fiber& fiber) {
  auto end = reinterpret_cast<uintptr_t>(fiber.stack.data() + fiber.stack.size()) & ~uintptr_t{15};
  void** top = reinterpret_cast<void**>(end - 8);  // as after a call
  *--top = reinterpret_cast<void*>(&begin);
  fiber.top = top - 6;
  fiber.status = Status::kReady;
  fiber.side = 0;
}

int count(int first, int end, Status status) {
  return static_cast<int>(std::count_if(fibers.begin() + first, fibers.begin() + end,
                                        [=](const Fiber& fiber) { return fiber.status == status; }));
}

void resume(int first, int end, Status status) {
  for (int t = first; t < end; ++t) {
    if (fibers[t].status == status) fibers[t].status = Status::kReady;
  }
}

void run_block(int threads) {
  static std::vector<int> order;
  order.resize(threads);
  for (int t = 0; t < threads; ++t) order[t] = t, prepare(fibers[t]);
  if (chance() % 8 == 0) std::shuffle(order.begin(), order.end(), chance);
  while (count(0, threads, Status::kDone) < threads) {
    if (chance() % 2) std::reverse(order.begin(), order.end());
    bool moved = false;
    for (int t : order) {
      if (fibers[t].status != Status::kReady) continue;
      current = t;
      thread_index = {static_cast<unsigned>(t), 0, 0};
      simulated_switch(&scheduler, fibers[t].top);
      moved = true;
    }
    for (int first = 0; first < threads; first += kWarp) {
      const int end = std::min(first + kWarp, threads), waiting = count(first, end, Status::kInWarp);
      if (waiting > 0 && count(first, end, Status::kDone) > 0) fail("a shuffle of lanes that have ended");
      if (waiting == end - first) resume(first, end, Status::kInWarp), moved = true;
    }
    const int stopped = count(0, threads, Status::kAtBarrier) + count(0, threads, Status::kDone);
    if (stopped == threads) {
      resume(0, threads, Status::kAtBarrier);
    } else if (!moved) {
      fail("some threads wait at a barrier and some in a shuffle");
    }
  }
}

}  // namespace

void barrier() { pause(Status::kAtBarrier); }
int lane() { return current % kWarp; }

void exchange(void* value, size_t size, int source) {
  Fiber& mine = fibers[current];
  const int side = mine.side ^= 1, from = current / kWarp * kWarp + source;
  std::memcpy(mine.given[side], value, size);
  pause(Status::kInWarp);
  std::memcpy(value, fibers[from].given[side], size);
}

cudaError_t allow_shared(int bytes) {
  if (bytes > kSharedMemory) return cudaErrorInvalidValue;
  allowed_shared = std::max(kOrdinaryShared, bytes);
  return cudaSuccess;
}

void launch(unsigned blocks, int threads, size_t shared, cudaStream_t, std::function<void()> function) {
  if (blocks == 0 || blocks > 0x7FFFFFFFu || threads <= 0 || threads > kMostThreads ||
      shared > static_cast<size_t>(allowed_shared)) {
    error = cudaErrorInvalidConfiguration;
    return;
  }
  enqueue([=] {
    body = &function;
    grid_size = dim3(blocks);
    block_size = dim3(threads);
    for (unsigned block = 0; block < blocks; ++block) {
      std::memset(shared_memory, 0xFF, shared);
      block_index = {block, 0, 0};
      run_block(threads);
    }
  });
}

}  // namespace simulated

// What csrc/cuda calls of the runtime, and what torch offers to extensions only where it has CUDA.
extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMultiProcessorCount) {
    *value = simulated::kMultiprocessors;
  } else if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) {
    *value = simulated::kSharedMemory;
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }

cudaError_t cudaGetLastError() { return std::exchange(simulated::error, cudaSuccess); }

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  simulated::enqueue([=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

struct DeviceGuardOpaque;
int32_t aoti_torch_create_device_guard(int32_t, DeviceGuardOpaque** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_device_guard(DeviceGuardOpaque*) { return 0; }

int32_t torch_c10_cuda_check_msg(int32_t error, const char* file, const char*, uint32_t line, bool, char** message) {
  const std::string text = "CUDA error " + std::to_string(error) + " at " + file + ":" + std::to_string(line);
  *message = error == cudaSuccess ? nullptr : strdup(text.c_str());
  return 0;
}
void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }

}  // extern "C"
