// add_noise_ and add_noise_out with transformed noise.
#include "fused_launch.cuh"

namespace zo::cuda {
namespace {

template <Transform transform>
cudaError_t by_type(const Fused& p, Type type, cudaStream_t stream) {
  switch (type) {
    case Type::kFloat32:
      return launch_fused<AddTransformed<Float32, transform>>(p, stream);
    case Type::kBFloat16:
      return launch_fused<AddTransformed<BFloat16, transform>>(p, stream);
    case Type::kFloat16:
      return launch_fused<AddTransformed<Float16, transform>>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_add_transformed(const Fused& args, Type type, Transform transform, cudaStream_t stream) {
  switch (transform) {
    case Transform::kScale:
      return by_type<Transform::kScale>(args, type, stream);
    case Transform::kMask:
      return by_type<Transform::kMask>(args, type, stream);
    case Transform::kDiag:
      return by_type<Transform::kDiag>(args, type, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace zo::cuda
