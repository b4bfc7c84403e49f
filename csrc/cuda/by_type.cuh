// One instance of a launch function for each element type.
#pragma once

#include "launch.h"
#include "memory.cuh"

namespace zo::cuda {

// `launch` takes the type of an element as a value of it: a Float32, a BFloat16 or a Float16.
template <class Launch>
cudaError_t by_type(Type type, const Launch& launch) {
  switch (type) {
    case Type::kFloat32:
      return launch(Float32{});
    case Type::kBFloat16:
      return launch(BFloat16{});
    case Type::kFloat16:
      return launch(Float16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace zo::cuda
