// state_fold_.
#include "fused_launch.cuh"

namespace zo::cuda {

cudaError_t launch_state_fold(const Fused& args, Type type, cudaStream_t stream) {
  if (args.x == nullptr) return launch_fused<Fold<Float32, false>>(args, stream);
  switch (type) {
    case Type::kFloat32:
      return launch_fused<Fold<Float32, true>>(args, stream);
    case Type::kBFloat16:
      return launch_fused<Fold<BFloat16, true>>(args, stream);
    case Type::kFloat16:
      return launch_fused<Fold<Float16, true>>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace zo::cuda
