// noise_fill_.
#include "elementwise_launch.cuh"

namespace zo::cuda {
namespace {

template <Noise noise>
cudaError_t by_type(const AddNoise& p, Type type, cudaStream_t stream) {
  switch (type) {
    case Type::kFloat32:
      return launch<Config<Float32, noise, false, 1, true>>(p, stream);
    case Type::kBFloat16:
      return launch<Config<BFloat16, noise, false, 1, true>>(p, stream);
    case Type::kFloat16:
      return launch<Config<Float16, noise, false, 1, true>>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_noise_fill(const AddNoise& args, Type type, Noise noise, cudaStream_t stream) {
  AddNoise p = args;
  p.x = p.out;
  return noise == Noise::kGaussian ? by_type<Noise::kGaussian>(p, type, stream)
                                   : by_type<Noise::kRademacher>(p, type, stream);
}

}  // namespace zo::cuda
