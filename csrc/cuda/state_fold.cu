// state_fold_.
#include "fused_launch.cuh"

namespace zo::cuda {

cudaError_t launch_state_fold(const Fused& args, Type type, cudaStream_t stream) {
  if (args.x == nullptr) return launch_fused<Fold<Float32, false>>(args, stream);
  return by_type(type, [&](auto element) { return launch_fused<Fold<decltype(element), true>>(args, stream); });
}

}  // namespace zo::cuda
