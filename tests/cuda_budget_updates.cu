// Kernels for tests/test_cuda_build.py with the branches resolved that all threads of a launch take alike: one gaussian
// term, bf16, to the nearest, no score. What their loops hold is what such a launch executes.
#include "fused_launch.cuh"
#include "kron.cu"

namespace zo::cuda {

template <class Op>
__global__ void __launch_bounds__(kFusedBlock, Op::kResident) fused_case(Fused p, Span span) {
  p.noise = Noise::kGaussian;
  p.terms = 1;
  p.rounding_seed = nullptr;
  p.added[0] = p.added[1] = nullptr;
  span.units = span.whole_end;
  span.whole_first = 0;
  fused_block<Op>(p, span);
}

#define ZO_KERNEL(...) template __global__ void fused_case<__VA_ARGS__>(Fused, Span)

ZO_KERNEL(AddTransformed<BFloat16, Transform::kScale>);
ZO_KERNEL(AddTransformed<BFloat16, Transform::kMask>);
ZO_KERNEL(AddTransformed<BFloat16, Transform::kDiag>);
ZO_KERNEL(Fold<Float32, false>);
ZO_KERNEL(Fold<BFloat16, true>);
ZO_KERNEL(RuleOp<BFloat16, Rule::kSign>);
ZO_KERNEL(RuleOp<BFloat16, Rule::kAdam>);
ZO_KERNEL(RuleOp<BFloat16, Rule::kHizoo>);

__global__ void __launch_bounds__(kCrew, 3) kron_case(Kron p) {
  extern __shared__ Vector memory[];
  p.noise = Noise::kGaussian;
  p.terms = 1;
  p.rounding_seed = nullptr;
  p.parts = nullptr;
  Crew crew;
  kron_block<BFloat16>(p, blockIdx.x, reinterpret_cast<float*>(memory), crew);
}

}  // namespace zo::cuda
