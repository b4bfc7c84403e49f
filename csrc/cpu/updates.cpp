// state_fold_, rule_step_ and mask_below_ on the CPU.

#include <memory>
#include <optional>

#include "lane_sum.h"
#include "units.h"

namespace zo::cpu {
namespace {

enum { kX, kState0, kValid = kState0 + kMostStates, kSquares, kOperands };

template <class Args>
void run_update(void (*kernel)(const Args&, const Update&, Scratch), const Args& args, const Range<kOperands>& range) {
  struct Buffers {
    Aligned<uint32_t> words;
    Aligned<float> z;
    explicit Buffers(int64_t terms) : words(terms * kWordsPerTile), z(terms * kWordsPerTile) {}
  };
  run(std::vector<Range<kOperands>>{range}, [&] {
    auto buffers = std::make_shared<Buffers>(std::max<int64_t>(args.noise.count, 1));
    return [&args, kernel, buffers](const Places<kOperands>& at, uint64_t unit, int64_t units) {
      Update update{at[kX], {}, unit, units, reinterpret_cast<int32_t*>(at[kValid]),
                    reinterpret_cast<double*>(at[kSquares])};
      for (int j = 0; j < kMostStates; ++j) update.states[j] = reinterpret_cast<float*>(at[kState0 + j]);
      kernel(args, update, {buffers->words.get(), buffers->z.get()});
    };
  });
}

Tensor state_fold_(const Tensor& state, const std::optional<Tensor>& x, const Tensor& seeds, const Tensor& streams,
                   const Tensor& coeffs, const std::optional<Tensor>& keep, const std::optional<Tensor>& x_coeffs,
                   const std::optional<Tensor>& x_keep, const std::optional<Tensor>& sr_seed,
                   const std::optional<Tensor>& valid, int64_t offset, int64_t noise) {
  const std::vector<Term> terms = terms_of(seeds, streams, coeffs);
  const Dtype dtype = x ? dtype_of(*x) : kFloat32;
  const std::optional<Key> rounding = dtype == kFloat32 ? std::nullopt : rounding_key(sr_seed);
  StateFold args;
  args.noise = {terms.data(), seeds.numel(), noise == table::GAUSSIAN};
  args.keep = pointer_of(keep);
  args.x_coefficients = pointer_of(x_coeffs);
  args.x_keep = pointer_of(x_keep);
  args.rounding = rounding ? &*rounding : nullptr;

  std::vector<double> squares(valid ? static_cast<size_t>(valid->numel()) : 0);
  Range<kOperands> range{{}, state.numel(), static_cast<uint64_t>(offset)};
  range.operands[kState0] = written(values_of(state.mutable_data_ptr(), kFloat32));
  if (x) range.operands[kX] = written(values_of(x->mutable_data_ptr(), dtype));
  std::vector<int32_t> counted;  // as `valid`, but of a last tile that is cut no more than is there: the rest is padding
  if (valid) {
    const int32_t* given = valid->const_data_ptr<int32_t>();
    range.operands[kValid] = {given, 32, true};
    const auto rest = static_cast<int32_t>(state.numel() % kTile);
    if (rest != 0 && given[valid->numel() - 1] > rest) {
      counted.assign(given, given + valid->numel());
      counted.back() = rest;
      range.operands[kValid].data = counted.data();
    }
    range.operands[kSquares] = {squares.data(), 64, true, true};
  }
  run_update(kernels().state_fold[dtype], args, range);

  const int64_t size = valid ? 1 : 0;
  Tensor result = torch::stable::new_empty(state, {&size, 1}, ScalarType::Double);
  if (valid) {
    *result.mutable_data_ptr<double>() =
        lane_sum(0, valid->numel(), [&](int64_t i) { return squares[static_cast<size_t>(i)]; });
  }
  return result;
}

void rule_step_(const Tensor& x, const std::vector<Tensor>& states, const Tensor& seeds, const Tensor& streams,
                const Tensor& coeffs, const Tensor& scalars, const std::optional<Tensor>& keep,
                const std::optional<Tensor>& sr_seed, int64_t offset, int64_t noise, int64_t rule) {
  const std::vector<Term> terms = terms_of(seeds, streams, coeffs);
  const Dtype dtype = dtype_of(x);
  const std::optional<Key> rounding = dtype == kFloat32 ? std::nullopt : rounding_key(sr_seed);
  RuleStep args;
  args.noise = {terms.data(), seeds.numel(), noise == table::GAUSSIAN};
  args.coefficients = coeffs.const_data_ptr<float>();
  args.scalars = scalars.const_data_ptr<float>();
  args.keep = pointer_of(keep);
  args.rounding = rounding ? &*rounding : nullptr;
  args.rule = static_cast<Rule>(rule);

  Range<kOperands> range{{}, x.numel(), static_cast<uint64_t>(offset)};
  range.operands[kX] = written(values_of(x.mutable_data_ptr(), dtype));
  for (size_t j = 0; j < states.size(); ++j) {
    range.operands[kState0 + j] = written(values_of(states[j].mutable_data_ptr(), kFloat32));
  }
  run_update(kernels().rule_step[dtype], args, range);
}

void mask_below_(const Tensor& bits, const Tensor& x, const Tensor& thresholds) {
  const Dtype dtype = dtype_of(x);
  const auto* values = static_cast<const char*>(x.const_data_ptr());
  const float* threshold = thresholds.const_data_ptr<float>();
  auto* to = bits.mutable_data_ptr<uint8_t>();
  torch::stable::parallel_for(0, thresholds.numel(), 2 * kUnitsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t count = std::min<int64_t>(x.numel() - tile * kTile, kTile);
      const char* from = values + tile * kTile * size_of(dtype);
      kernels().mask_below[dtype](from, count, threshold[tile], to + tile * kTile / 8);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zoengine_C, CPU, m) {
  m.impl("state_fold_", TORCH_BOX(&state_fold_));
  m.impl("rule_step_", TORCH_BOX(&rule_step_));
  m.impl("mask_below_", TORCH_BOX(&mask_below_));
}

}  // namespace zo::cpu
