// add_noise_ and add_noise_out with transformed noise.
#include "fused_launch.cuh"

namespace zo::cuda {
namespace {

template <Transform transform>
cudaError_t add(const Fused& p, Type type, cudaStream_t stream) {
  return by_type(type, [&](auto element) {
    return launch_fused<AddTransformed<decltype(element), transform>>(p, stream);
  });
}

}  // namespace

cudaError_t launch_add_transformed(const Fused& args, Type type, Transform transform, cudaStream_t stream) {
  switch (transform) {
    case Transform::kScale:
      return add<Transform::kScale>(args, type, stream);
    case Transform::kMask:
      return add<Transform::kMask>(args, type, stream);
    case Transform::kDiag:
      return add<Transform::kDiag>(args, type, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace zo::cuda
