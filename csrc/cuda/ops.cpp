// The CUDA half of zoengine_C: unpacks tensors and starts the kernels on the current stream of the tensors' device.
// The schemas stand in zoengine/ops/schema.py; arguments are checked there. Nothing here reads device memory.

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
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(const Tensor& tensor) {
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

void add_noise_out(const Tensor& x, const Tensor& seeds, const Tensor& coeffs, const std::vector<Tensor>& states,
                   const std::optional<Tensor>& keep, const std::optional<Tensor>& sr_seed, int64_t offset,
                   int64_t stream, int64_t noise, const Tensor& out) {
  STD_TORCH_CHECK(states.size() <= kMaxStates, "zoengine: at most ", kMaxStates, " states, got ", states.size());
  AddNoise args{};
  args.x = x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.seeds = seeds.const_data_ptr<int64_t>();
  args.coeffs = coeffs.const_data_ptr<float>();
  for (size_t j = 0; j < states.size(); ++j) args.states[j] = states[j].const_data_ptr<float>();
  args.keep = keep ? keep->const_data_ptr<float>() : nullptr;
  args.rounding_seed = sr_seed ? sr_seed->const_data_ptr<int64_t>() : nullptr;
  args.count = x.numel();
  args.offset = static_cast<uint64_t>(offset);
  args.stream = static_cast<uint32_t>(stream);
  args.terms = static_cast<int32_t>(seeds.numel());
  args.state_count = static_cast<int32_t>(states.size());
  OnDevice device(x);
  STD_CUDA_CHECK(launch_add_noise(args, type_of(x), static_cast<Noise>(noise), device.stream));
}

void add_noise_(const Tensor& x, const Tensor& seeds, const Tensor& coeffs, const std::vector<Tensor>& states,
                const std::optional<Tensor>& keep, const std::optional<Tensor>& sr_seed, int64_t offset,
                int64_t stream, int64_t noise) {
  add_noise_out(x, seeds, coeffs, states, keep, sr_seed, offset, stream, noise, x);
}

void noise_fill_(const Tensor& out, const Tensor& seed, int64_t offset, int64_t stream, int64_t noise) {
  AddNoise args{};
  args.out = out.mutable_data_ptr();
  args.seeds = seed.const_data_ptr<int64_t>();
  args.count = out.numel();
  args.offset = static_cast<uint64_t>(offset);
  args.stream = static_cast<uint32_t>(stream);
  args.terms = 1;
  OnDevice device(out);
  STD_CUDA_CHECK(launch_noise_fill(args, type_of(out), static_cast<Noise>(noise), device.stream));
}

Tensor new_doubles(std::vector<int64_t> sizes, const Tensor& like) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, ScalarType::Double);
}

Segments segments_of(const Tensor& x, const Tensor& starts, const Tensor& lengths) {
  return {x.const_data_ptr(), starts.const_data_ptr<int64_t>(), lengths.const_data_ptr<int64_t>(), starts.numel()};
}

Tensor segment_stats(const Tensor& x, const Tensor& starts, const Tensor& lengths) {
  OnDevice device(x);
  Segments segments = segments_of(x, starts, lengths);
  Tensor result = new_doubles({segments.count, 4}, x);
  Tensor workspace = new_doubles({stats_workspace(segments.count)}, x);  // freed on the stream that used it
  STD_CUDA_CHECK(launch_segment_stats(segments, type_of(x), workspace.mutable_data_ptr<double>(),
                                      result.mutable_data_ptr<double>(), device.stream));
  return result;
}

Tensor segment_dots(const Tensor& x, const Tensor& starts, const Tensor& lengths, const Factor& factor) {
  OnDevice device(x);
  Segments segments = segments_of(x, starts, lengths);
  Tensor result = new_doubles({segments.count}, x);
  Tensor workspace = new_doubles({dot_workspace(segments.count)}, x);
  STD_CUDA_CHECK(launch_segment_dot(segments, type_of(x), factor, workspace.mutable_data_ptr<double>(),
                                    result.mutable_data_ptr<double>(), device.stream));
  return result;
}

Tensor segment_dot(const Tensor& x, const Tensor& y, const Tensor& starts, const Tensor& lengths) {
  Factor factor{};
  factor.y = y.const_data_ptr();
  factor.y_type = type_of(y);
  return segment_dots(x, starts, lengths, factor);
}

Tensor segment_dot_noise(const Tensor& x, const Tensor& seed, const Tensor& starts, const Tensor& lengths,
                         int64_t offset, int64_t stream, int64_t noise) {
  Factor factor{};
  factor.seed = seed.const_data_ptr<int64_t>();
  factor.offset = static_cast<uint64_t>(offset);
  factor.stream = static_cast<uint32_t>(stream);
  factor.noise = static_cast<Noise>(noise);
  return segment_dots(x, starts, lengths, factor);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zoengine_C, CUDA, m) {
  m.impl("add_noise_", TORCH_BOX(&add_noise_));
  m.impl("add_noise_out", TORCH_BOX(&add_noise_out));
  m.impl("noise_fill_", TORCH_BOX(&noise_fill_));
  m.impl("segment_stats", TORCH_BOX(&segment_stats));
  m.impl("segment_dot", TORCH_BOX(&segment_dot));
  m.impl("segment_dot_noise", TORCH_BOX(&segment_dot_noise));
}

}  // namespace zo::cuda
