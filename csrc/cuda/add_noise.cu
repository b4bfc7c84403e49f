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
cudaError_t add(const AddNoise& p, Type type, cudaStream_t stream) {
  return by_type(type, [&](auto element) {
    using T = decltype(element);
    if constexpr (T::kPerWord == 2) {  // fp32 is exact either way
      if (p.rounding_seed != nullptr) return by_terms<T, noise, true>(p, stream);
    }
    return by_terms<T, noise, false>(p, stream);
  });
}

}  // namespace

cudaError_t launch_add_noise(const AddNoise& args, Type type, Noise noise, cudaStream_t stream) {
  return noise == Noise::kGaussian ? add<Noise::kGaussian>(args, type, stream)
                                   : add<Noise::kRademacher>(args, type, stream);
}

}  // namespace zo::cuda
