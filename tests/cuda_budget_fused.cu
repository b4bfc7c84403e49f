// Fused kernels for tests/test_cuda_build.py with the branches resolved that all threads of a launch take alike: one
// gaussian term, to the nearest, bf16. Their loop over units is what such a launch executes.
#include "fused_launch.cuh"

namespace zo::cuda {

template <class Op>
__global__ void __launch_bounds__(kFusedBlock, Op::kResident) resolved(Fused p, Span span) {
  p.noise = Noise::kGaussian;
  p.terms = 1;
  p.rounding_seed = nullptr;
  p.added[0] = p.added[1] = nullptr;
  span.units = span.whole_end;
  span.whole_first = 0;
  fused_block<Op>(p, span);
}

#define ZO_KERNEL(...) template __global__ void resolved<__VA_ARGS__>(Fused, Span)

ZO_KERNEL(AddTransformed<BFloat16, Transform::kScale>);
ZO_KERNEL(AddTransformed<BFloat16, Transform::kMask>);
ZO_KERNEL(AddTransformed<BFloat16, Transform::kDiag>);
ZO_KERNEL(Fold<Float32, false>);
ZO_KERNEL(Fold<BFloat16, true>);
ZO_KERNEL(RuleOp<BFloat16, Rule::kSign>);
ZO_KERNEL(RuleOp<BFloat16, Rule::kAdam>);
ZO_KERNEL(RuleOp<BFloat16, Rule::kHizoo>);

}  // namespace zo::cuda
