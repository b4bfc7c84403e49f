// add_noise_, add_noise_out and noise_fill_ on the CPU: whole units are split among torch's threads, so that no result
// depends on their number. The schemas stand in zoengine/ops/schema.py; arguments are checked in zoengine/ops.

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "tensors.h"

namespace zo::cpu {
namespace {

constexpr int64_t kUnitsPerThread = 8;  // below this a thread is not worth waking

// x[0 .. count) stand at stream index offset; a null x reads as -0.
struct Range {
  const char* x;
  char* out;
  Dtype dtype;
  int64_t count;
  uint64_t offset;
  std::vector<const float*> states;
};

// A unit that reaches beyond the range: done on copies that are padded to a whole unit.
void partial_unit(const AddNoise& args, const Range& range, uint64_t unit, uint32_t* words) {
  const int64_t size = size_of(range.dtype);
  const uint64_t start = unit * kUnit;
  const int64_t skip = start < range.offset ? static_cast<int64_t>(range.offset - start) : 0;
  const int64_t first = start > range.offset ? static_cast<int64_t>(start - range.offset) : 0;  // in the range
  const int64_t count = std::min(range.count - first, kUnit - skip);

  alignas(64) char data[kUnit * sizeof(float)] = {};
  if (range.x) std::memcpy(data + skip * size, range.x + first * size, static_cast<size_t>(count * size));
  std::vector<float> copies(range.states.size() * kUnit);
  std::vector<const float*> states;
  for (size_t j = 0; j < range.states.size(); ++j) {
    float* copy = copies.data() + j * kUnit;
    std::memcpy(copy + skip, range.states[j] + first, static_cast<size_t>(count) * sizeof(float));
    states.push_back(copy);
  }
  kernels().add_noise[range.dtype](args, {range.x ? data : nullptr, data, states.data(), unit, 1}, words);
  std::memcpy(range.out + first * size, data + skip * size, static_cast<size_t>(count * size));
}

void run_units(const AddNoise& args, const Range& range, uint64_t begin, uint64_t end) {
  Aligned<uint32_t> words(args.term_count * kWordsPerTile);
  const uint64_t last = range.offset + static_cast<uint64_t>(range.count);
  if (begin < end && begin * kUnit < range.offset) partial_unit(args, range, begin++, words.get());
  const bool cut = begin < end && end * kUnit > last;
  if (cut) --end;
  if (begin < end) {
    const int64_t place = static_cast<int64_t>(begin * kUnit - range.offset);
    const int64_t bytes = place * size_of(range.dtype);
    std::vector<const float*> states = range.states;
    for (const float*& state : states) state += place;
    const Span span{range.x ? range.x + bytes : nullptr, range.out + bytes, states.data(), begin,
                    static_cast<int64_t>(end - begin)};
    kernels().add_noise[range.dtype](args, span, words.get());
  }
  if (cut) partial_unit(args, range, end, words.get());
}

void run(const AddNoise& args, const Range& range) {
  if (range.count == 0) return;
  const uint64_t begin = range.offset / kUnit;
  const uint64_t end = (range.offset + static_cast<uint64_t>(range.count) + kUnit - 1) / kUnit;
  torch::stable::parallel_for(0, static_cast<int64_t>(end - begin), kUnitsPerThread, [&](int64_t first, int64_t last) {
    run_units(args, range, begin + static_cast<uint64_t>(first), begin + static_cast<uint64_t>(last));
  });
}

void add_noise_out(const Tensor& x, const Tensor& seeds, const Tensor& streams, const Tensor& coeffs,
                   const std::vector<Tensor>& states, const std::optional<Tensor>& keep,
                   const std::optional<Tensor>& sr_seed, int64_t offset, int64_t noise, int64_t transform,
                   const std::optional<Tensor>& operand, const Tensor& out) {
  const int64_t* seed = seeds.const_data_ptr<int64_t>();
  const int64_t* stream = streams.const_data_ptr<int64_t>();
  const float* coefficient = coeffs.const_data_ptr<float>();
  std::vector<Term> terms;
  for (int64_t k = 0; k < seeds.numel(); ++k) {
    terms.push_back({key_of(seed[k]), static_cast<uint32_t>(stream[k]), coefficient[k]});
  }
  Key rounding;
  if (sr_seed) rounding = key_of(*sr_seed->const_data_ptr<int64_t>());

  AddNoise args;
  args.terms = terms.data();
  args.term_count = seeds.numel();
  args.state_coefficients = coefficient + seeds.numel();
  args.state_count = static_cast<int64_t>(states.size());
  args.keep = keep ? keep->const_data_ptr<float>() : nullptr;
  args.rounding = sr_seed ? &rounding : nullptr;
  args.gaussian = noise == table::GAUSSIAN;

  Range range{static_cast<const char*>(x.const_data_ptr()), static_cast<char*>(out.mutable_data_ptr()), dtype_of(x),
              x.numel(), static_cast<uint64_t>(offset), {}};
  for (const Tensor& state : states) range.states.push_back(state.const_data_ptr<float>());
  run(args, range);
}

void add_noise_(const Tensor& x, const Tensor& seeds, const Tensor& streams, const Tensor& coeffs,
                const std::vector<Tensor>& states, const std::optional<Tensor>& keep,
                const std::optional<Tensor>& sr_seed, int64_t offset, int64_t noise, int64_t transform,
                const std::optional<Tensor>& operand) {
  add_noise_out(x, seeds, streams, coeffs, states, keep, sr_seed, offset, noise, transform, operand, x);
}

void noise_fill_(const Tensor& out, const Tensor& seed, int64_t offset, int64_t stream, int64_t noise) {
  const Term term = fill_term(seed, stream);
  run(fill_args(term, noise), {nullptr, static_cast<char*>(out.mutable_data_ptr()), dtype_of(out), out.numel(),
                                       static_cast<uint64_t>(offset), {}});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zoengine_C, CPU, m) {
  m.impl("add_noise_", TORCH_BOX(&add_noise_));
  m.impl("add_noise_out", TORCH_BOX(&add_noise_out));
  m.impl("noise_fill_", TORCH_BOX(&noise_fill_));
}

}  // namespace zo::cpu
