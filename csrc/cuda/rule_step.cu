// rule_step_.
#include "fused_launch.cuh"

namespace zo::cuda {
namespace {

template <Rule rule>
cudaError_t step(const Fused& p, Type type, cudaStream_t stream) {
  return by_type(type, [&](auto element) { return launch_fused<RuleOp<decltype(element), rule>>(p, stream); });
}

}  // namespace

cudaError_t launch_rule_step(const Fused& args, Type type, Rule rule, cudaStream_t stream) {
  switch (rule) {
    case Rule::kSign:
      return step<Rule::kSign>(args, type, stream);
    case Rule::kAdam:
      return step<Rule::kAdam>(args, type, stream);
    case Rule::kAmsgrad:
      return step<Rule::kAmsgrad>(args, type, stream);
    case Rule::kAdamu:
      return step<Rule::kAdamu>(args, type, stream);
    case Rule::kHizoo:
      return step<Rule::kHizoo>(args, type, stream);
    case Rule::kAdamReplay:
      return step<Rule::kAdamReplay>(args, type, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace zo::cuda
