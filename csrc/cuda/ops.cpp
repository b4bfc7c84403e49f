// The CUDA half of zoengine_C: unpacks tensors and starts the kernels on the current stream of the tensors' device.
// The schemas stand in zoengine/ops/schema.py; arguments are checked there. Nothing here reads device memory.
// Elementwise ops; those over segments and matrices are in ops_segments.cpp and ops_matrices.cpp.
#include "tensors.h"

namespace zo::cuda {
namespace {

// What the fused ops have in common.
Fused fused_terms(const Tensor& seeds, const Tensor& streams, const Tensor& coeffs, const std::optional<Tensor>& keep,
                  const std::optional<Tensor>& sr_seed, int64_t count, int64_t offset, int64_t noise) {
  Fused args{};
  args.seeds = seeds.const_data_ptr<int64_t>();
  args.streams = streams.const_data_ptr<int64_t>();
  args.coeffs = coeffs.const_data_ptr<float>();
  args.keep = pointer<float>(keep);
  args.rounding_seed = pointer<int64_t>(sr_seed);
  args.count = count;
  args.offset = static_cast<uint64_t>(offset);
  args.terms = static_cast<int32_t>(seeds.numel());
  args.noise = static_cast<Noise>(noise);
  return args;
}

void add_noise_out(const Tensor& x, const Tensor& seeds, const Tensor& streams, const Tensor& coeffs,
                   const std::vector<Tensor>& states, const std::optional<Tensor>& keep,
                   const std::optional<Tensor>& sr_seed, int64_t offset, int64_t noise, int64_t transform,
                   const std::optional<Tensor>& operand, const Tensor& out) {
  STD_TORCH_CHECK(states.size() <= kMaxStates, "zoengine: at most ", kMaxStates, " states, got ", states.size());
  OnDevice device(x);
  const Transform kind = static_cast<Transform>(transform);
  if (kind != Transform::kNone) {
    Fused args = fused_terms(seeds, streams, coeffs, keep, sr_seed, x.numel(), offset, noise);
    args.x = x.const_data_ptr();
    args.out = out.mutable_data_ptr();
    for (size_t j = 0; j < states.size(); ++j) args.added[j] = states[j].const_data_ptr<float>();
    if (kind == Transform::kScale) args.scale = operand->const_data_ptr<float>();
    if (kind == Transform::kMask) args.bits = operand->const_data_ptr<uint8_t>();
    if (kind == Transform::kDiag) args.diag = operand->const_data_ptr<float>();
    STD_CUDA_CHECK(launch_add_transformed(args, type_of(x), kind, device.stream));
    return;
  }
  AddNoise args{};
  args.x = x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.seeds = seeds.const_data_ptr<int64_t>();
  args.streams = streams.const_data_ptr<int64_t>();
  args.coeffs = coeffs.const_data_ptr<float>();
  for (size_t j = 0; j < states.size(); ++j) args.states[j] = states[j].const_data_ptr<float>();
  args.keep = pointer<float>(keep);
  args.rounding_seed = pointer<int64_t>(sr_seed);
  args.count = x.numel();
  args.offset = static_cast<uint64_t>(offset);
  args.terms = static_cast<int32_t>(seeds.numel());
  args.state_count = static_cast<int32_t>(states.size());
  STD_CUDA_CHECK(launch_add_noise(args, type_of(x), static_cast<Noise>(noise), device.stream));
}

void add_noise_(const Tensor& x, const Tensor& seeds, const Tensor& streams, const Tensor& coeffs,
                const std::vector<Tensor>& states, const std::optional<Tensor>& keep,
                const std::optional<Tensor>& sr_seed, int64_t offset, int64_t noise, int64_t transform,
                const std::optional<Tensor>& operand) {
  add_noise_out(x, seeds, streams, coeffs, states, keep, sr_seed, offset, noise, transform, operand, x);
}

void noise_fill_(const Tensor& out, const Tensor& seed, int64_t offset, int64_t stream, int64_t noise) {
  AddNoise args{};
  args.out = out.mutable_data_ptr();
  args.seeds = seed.const_data_ptr<int64_t>();
  args.count = out.numel();
  args.offset = static_cast<uint64_t>(offset);
  args.stream = static_cast<uint32_t>(stream);
  args.terms = 1;
  OnDevice device(out);
  STD_CUDA_CHECK(launch_noise_fill(args, type_of(out), static_cast<Noise>(noise), device.stream));
}

Tensor state_fold_(const Tensor& state, const std::optional<Tensor>& x, const Tensor& seeds, const Tensor& streams,
                   const Tensor& coeffs, const std::optional<Tensor>& keep, const std::optional<Tensor>& x_coeffs,
                   const std::optional<Tensor>& x_keep, const std::optional<Tensor>& sr_seed,
                   const std::optional<Tensor>& valid, int64_t offset, int64_t noise) {
  OnDevice device(state);
  Fused args = fused_terms(seeds, streams, coeffs, x_keep, sr_seed, state.numel(), offset, noise);
  args.states[0] = state.mutable_data_ptr<float>();
  args.state_keep = pointer<float>(keep);
  if (x) {
    args.x = x->const_data_ptr();
    args.out = x->mutable_data_ptr();
    args.numbers = pointer<float>(x_coeffs);
  }
  const Type type = x ? type_of(*x) : Type::kFloat32;
  Tensor squares = new_doubles({valid ? 1 : 0}, state);
  if (!valid) {
    STD_CUDA_CHECK(launch_state_fold(args, type, device.stream));
    return squares;
  }
  const int64_t tiles = valid->numel();
  Tensor workspace = new_doubles({tiles + kTileSumLanes}, state);  // freed on the stream that used it
  args.valid = valid->const_data_ptr<int32_t>();
  args.squares = workspace.mutable_data_ptr<double>();
  STD_CUDA_CHECK(launch_state_fold(args, type, device.stream));
  STD_CUDA_CHECK(launch_tile_sum(args.squares, tiles, args.squares + tiles, squares.mutable_data_ptr<double>(),
                                 device.stream));
  return squares;
}

void rule_step_(const Tensor& x, const std::vector<Tensor>& states, const Tensor& seeds, const Tensor& streams,
                const Tensor& coeffs, const Tensor& scalars, const std::optional<Tensor>& keep,
                const std::optional<Tensor>& sr_seed, int64_t offset, int64_t noise, int64_t rule) {
  OnDevice device(x);
  Fused args = fused_terms(seeds, streams, coeffs, keep, sr_seed, x.numel(), offset, noise);
  args.x = x.const_data_ptr();
  args.out = x.mutable_data_ptr();
  for (size_t j = 0; j < states.size(); ++j) args.states[j] = states[j].mutable_data_ptr<float>();
  args.numbers = scalars.const_data_ptr<float>();
  STD_CUDA_CHECK(launch_rule_step(args, type_of(x), static_cast<Rule>(rule), device.stream));
}

void mask_below_(const Tensor& bits, const Tensor& x, const Tensor& thresholds) {
  OnDevice device(x);
  STD_CUDA_CHECK(launch_mask_below(bits.mutable_data_ptr<uint8_t>(), x.const_data_ptr(), type_of(x),
                                   thresholds.const_data_ptr<float>(), x.numel(), device.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zoengine_C, CUDA, m) {
  m.impl("add_noise_", TORCH_BOX(&add_noise_));
  m.impl("add_noise_out", TORCH_BOX(&add_noise_out));
  m.impl("noise_fill_", TORCH_BOX(&noise_fill_));
  m.impl("state_fold_", TORCH_BOX(&state_fold_));
  m.impl("rule_step_", TORCH_BOX(&rule_step_));
  m.impl("mask_below_", TORCH_BOX(&mask_below_));
}

}  // namespace zo::cuda
