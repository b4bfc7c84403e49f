// rule_step_.
#include "fused_launch.cuh"

namespace zo::cuda {
namespace {

template <Rule rule>
cudaError_t by_type(const Fused& p, Type type, cudaStream_t stream) {
  switch (type) {
    case Type::kFloat32:
      return launch_fused<RuleOp<Float32, rule>>(p, stream);
    case Type::kBFloat16:
      return launch_fused<RuleOp<BFloat16, rule>>(p, stream);
    case Type::kFloat16:
      return launch_fused<RuleOp<Float16, rule>>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_rule_step(const Fused& args, Type type, Rule rule, cudaStream_t stream) {
  switch (rule) {
    case Rule::kSign:
      return by_type<Rule::kSign>(args, type, stream);
    case Rule::kAdam:
      return by_type<Rule::kAdam>(args, type, stream);
    case Rule::kAmsgrad:
      return by_type<Rule::kAmsgrad>(args, type, stream);
    case Rule::kAdamu:
      return by_type<Rule::kAdamu>(args, type, stream);
    case Rule::kHizoo:
      return by_type<Rule::kHizoo>(args, type, stream);
    case Rule::kAdamReplay:
      return by_type<Rule::kAdamReplay>(args, type, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace zo::cuda
