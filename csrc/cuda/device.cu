// Whether this build holds code for a device.
#include "launch.h"

namespace zo::cuda {
namespace {

__global__ void nothing() {}

}  // namespace

cudaError_t check_device() {
  cudaFuncAttributes found;
  cudaError_t error = cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(&nothing));
  cudaGetLastError();  // the error is told here and is nobody else's
  return error;
}

}  // namespace zo::cuda
