// add_noise_, add_noise_out, noise_fill_ and segment_noise_fill_ on the CPU. The schemas stand in
// zoengine/ops/schema.py; arguments are checked in zoengine/ops.

#include <memory>
#include <optional>

#include "units.h"

namespace zo::cpu {
namespace {

enum { kX, kOut, kState0, kState1, kOperand, kOperands };

void run_add_noise(const AddNoise& args, const std::vector<Range<kOperands>>& ranges, Dtype dtype) {
  run(ranges, [&] {
    auto words = std::make_shared<Aligned<uint32_t>>(args.term_count * kWordsPerTile);
    return [&args, dtype, words](const Places<kOperands>& at, uint64_t unit, int64_t units) {
      const float* states[2] = {reinterpret_cast<float*>(at[kState0]), reinterpret_cast<float*>(at[kState1])};
      kernels().add_noise[dtype](args, {at[kX], at[kOut], states, unit, units, at[kOperand]}, words->get());
    };
  });
}

Operand operand_of(Transform transform, const std::optional<Tensor>& tensor) {
  if (!tensor) return {};
  return {tensor->const_data_ptr(), transform == kMask ? 1 : 32, transform == kScale};
}

void add_noise_out(const Tensor& x, const Tensor& seeds, const Tensor& streams, const Tensor& coeffs,
                   const std::vector<Tensor>& states, const std::optional<Tensor>& keep,
                   const std::optional<Tensor>& sr_seed, int64_t offset, int64_t noise, int64_t transform,
                   const std::optional<Tensor>& operand, const Tensor& out) {
  const std::vector<Term> terms = terms_of(seeds, streams, coeffs);
  const std::optional<Key> rounding = rounding_key(sr_seed);
  AddNoise args;
  args.terms = terms.data();
  args.term_count = seeds.numel();
  args.state_coefficients = coeffs.const_data_ptr<float>() + seeds.numel();
  args.state_count = static_cast<int64_t>(states.size());
  args.keep = pointer_of(keep);
  args.rounding = rounding ? &*rounding : nullptr;
  args.gaussian = noise == table::GAUSSIAN;
  args.transform = static_cast<Transform>(transform);

  const Dtype dtype = dtype_of(x);
  Range<kOperands> range{{}, x.numel(), static_cast<uint64_t>(offset)};
  range.operands[kX] = values_of(x.const_data_ptr(), dtype);
  range.operands[kOut] = written(values_of(out.mutable_data_ptr(), dtype));
  for (size_t j = 0; j < states.size(); ++j) {
    range.operands[kState0 + j] = values_of(states[j].const_data_ptr(), kFloat32);
  }
  range.operands[kOperand] = operand_of(args.transform, operand);
  run_add_noise(args, {range}, dtype);
}

void add_noise_(const Tensor& x, const Tensor& seeds, const Tensor& streams, const Tensor& coeffs,
                const std::vector<Tensor>& states, const std::optional<Tensor>& keep,
                const std::optional<Tensor>& sr_seed, int64_t offset, int64_t noise, int64_t transform,
                const std::optional<Tensor>& operand) {
  add_noise_out(x, seeds, streams, coeffs, states, keep, sr_seed, offset, noise, transform, operand, x);
}

void segment_noise_fill_(const Tensor& out, const Tensor& seed, const Tensor& starts, const Tensor& lengths,
                         const Tensor& indices, int64_t stream, int64_t noise) {
  const Term term = fill_term(seed, stream);
  const Dtype dtype = dtype_of(out);
  auto* data = static_cast<char*>(out.mutable_data_ptr());
  std::vector<Range<kOperands>> ranges;
  for (int64_t s = 0; s < starts.numel(); ++s) {
    Range<kOperands> range{{}, lengths.const_data_ptr<int64_t>()[s],
                           static_cast<uint64_t>(indices.const_data_ptr<int64_t>()[s])};
    range.operands[kOut] = written(values_of(data + starts.const_data_ptr<int64_t>()[s] * size_of(dtype), dtype));
    ranges.push_back(range);
  }
  run_add_noise(fill_args(term, noise), ranges, dtype);
}

void noise_fill_(const Tensor& out, const Tensor& seed, int64_t offset, int64_t stream, int64_t noise) {
  const Term term = fill_term(seed, stream);
  Range<kOperands> range{{}, out.numel(), static_cast<uint64_t>(offset)};
  range.operands[kOut] = written(values_of(out.mutable_data_ptr(), dtype_of(out)));
  run_add_noise(fill_args(term, noise), {range}, dtype_of(out));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zoengine_C, CPU, m) {
  m.impl("add_noise_", TORCH_BOX(&add_noise_));
  m.impl("add_noise_out", TORCH_BOX(&add_noise_out));
  m.impl("noise_fill_", TORCH_BOX(&noise_fill_));
  m.impl("segment_noise_fill_", TORCH_BOX(&segment_noise_fill_));
}

}  // namespace zo::cpu
