// The kernels that tests/test_cuda_build.py counts on every architecture, without the rest of their family.
#include "elementwise_launch.cuh"

namespace zo::cuda {

#define ZO_KERNEL(...) template __global__ void elementwise<__VA_ARGS__>(AddNoise, Range<__VA_ARGS__>)

ZO_KERNEL(Config<BFloat16, Noise::kGaussian, false, 1>);
ZO_KERNEL(Config<Float32, Noise::kGaussian, false, 1>);
ZO_KERNEL(Config<BFloat16, Noise::kRademacher, false, 1>);
ZO_KERNEL(Config<BFloat16, Noise::kGaussian, true, 1>);
ZO_KERNEL(Config<BFloat16, Noise::kGaussian, false, 0>);
ZO_KERNEL(Config<BFloat16, Noise::kGaussian, true, 0>);
ZO_KERNEL(Config<Float32, Noise::kGaussian, false, 0>);
ZO_KERNEL(Config<BFloat16, Noise::kGaussian, false, 1, true>);

}  // namespace zo::cuda
