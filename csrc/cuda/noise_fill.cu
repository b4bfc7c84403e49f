// noise_fill_.
#include "elementwise_launch.cuh"

namespace zo::cuda {
namespace {

template <Noise noise>
cudaError_t fill(const AddNoise& p, Type type, cudaStream_t stream) {
  return by_type(type, [&](auto element) {
    return launch<Config<decltype(element), noise, false, 1, true>>(p, stream);
  });
}

}  // namespace

cudaError_t launch_noise_fill(const AddNoise& args, Type type, Noise noise, cudaStream_t stream) {
  AddNoise p = args;
  p.x = p.out;
  return noise == Noise::kGaussian ? fill<Noise::kGaussian>(p, type, stream)
                                   : fill<Noise::kRademacher>(p, type, stream);
}

}  // namespace zo::cuda
