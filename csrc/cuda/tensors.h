// What the registration files share: tensors as plain pointers, and the stream to launch on.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "launch.h"

namespace zo::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Type::kFloat32;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    case ScalarType::Half:
      return Type::kFloat16;
    default:
      STD_TORCH_CHECK(false, "zoengine: tensors must be float32, bfloat16 or float16");
  }
}

// Makes a tensor's device the current one for a scope; `stream` is torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// The data of a tensor that may be missing: null then.
template <class T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

inline Tensor new_doubles(std::vector<int64_t> sizes, const Tensor& like) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, ScalarType::Double);
}

}  // namespace zo::cuda
