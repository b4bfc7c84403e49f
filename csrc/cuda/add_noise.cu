// add_noise_ and add_noise_out.
#include "elementwise_launch.cuh"

namespace zo::cuda {
namespace {

template <class T, Noise noise, bool stochastic>
cudaError_t by_terms(const AddNoise& p, cudaStream_t stream) {
  bool plain = p.keep == nullptr && p.state_count == 0;
  if (plain && p.terms == 1) return launch<Config<T, noise, stochastic, 1>>(p, stream);
  if constexpr (noise == Noise::kGaussian) {
    if (plain && p.terms == 2) return launch<Config<T, noise, stochastic, 2>>(p, stream);
  }
  return launch<Config<T, noise, stochastic, 0>>(p, stream);
}

template <Noise noise>
cudaError_t by_type(const AddNoise& p, Type type, cudaStream_t stream) {
  bool stochastic = p.rounding_seed != nullptr;
  switch (type) {
    case Type::kFloat32:
      return by_terms<Float32, noise, false>(p, stream);  // exact either way
    case Type::kBFloat16:
      return stochastic ? by_terms<BFloat16, noise, true>(p, stream) : by_terms<BFloat16, noise, false>(p, stream);
    case Type::kFloat16:
      return stochastic ? by_terms<Float16, noise, true>(p, stream) : by_terms<Float16, noise, false>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_add_noise(const AddNoise& args, Type type, Noise noise, cudaStream_t stream) {
  return noise == Noise::kGaussian ? by_type<Noise::kGaussian>(args, type, stream)
                                   : by_type<Noise::kRademacher>(args, type, stream);
}

}  // namespace zo::cuda
