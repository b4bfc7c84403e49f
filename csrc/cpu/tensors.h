// What the CPU ops share: from torch's arguments to those of the kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "noise_table.h"

namespace zo::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, "zoengine: tensors must be float32, bfloat16 or float16");
  }
}

inline int64_t size_of(Dtype dtype) { return dtype == kFloat32 ? 4 : 2; }

inline Key key_of(int64_t seed) {
  Key key;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int r = 0; r < kRounds; ++r) {
    key.k0[r] = k0 + static_cast<uint32_t>(r) * table::PHILOX_W0;
    key.k1[r] = k1 + static_cast<uint32_t>(r) * table::PHILOX_W1;
  }
  return key;
}

// A buffer whose start is aligned for every vector.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t count)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64}))) {}
  ~Aligned() { ::operator delete(data_, std::align_val_t{64}); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

inline std::vector<Term> terms_of(const Tensor& seeds, const Tensor& streams, const Tensor& coeffs) {
  const int64_t* seed = seeds.const_data_ptr<int64_t>();
  const int64_t* stream = streams.const_data_ptr<int64_t>();
  const float* coefficient = coeffs.const_data_ptr<float>();
  std::vector<Term> terms;
  for (int64_t k = 0; k < seeds.numel(); ++k) {
    terms.push_back({key_of(seed[k]), static_cast<uint32_t>(stream[k]), coefficient[k]});
  }
  return terms;
}

// The same with all terms on the stream of directions.
inline std::vector<Term> direction_terms(const Tensor& seeds, const Tensor& coeffs) {
  std::vector<Term> terms;
  for (int64_t k = 0; k < seeds.numel(); ++k) {
    terms.push_back({key_of(seeds.const_data_ptr<int64_t>()[k]), table::STREAM_DIRECTION,
                     coeffs.const_data_ptr<float>()[k]});
  }
  return terms;
}

inline std::optional<Key> rounding_key(const std::optional<Tensor>& sr_seed) {
  return sr_seed ? std::optional<Key>(key_of(*sr_seed->const_data_ptr<int64_t>())) : std::nullopt;
}

inline const float* pointer_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

// The noise itself is one term of coefficient 1 added to -0, the only number that leaves every z as it is.
inline Term fill_term(const Tensor& seed, int64_t stream) {
  return {key_of(*seed.const_data_ptr<int64_t>()), static_cast<uint32_t>(stream), 1.0f};
}

inline AddNoise fill_args(const Term& term, int64_t noise) {
  AddNoise args{};
  args.terms = &term;
  args.term_count = 1;
  args.gaussian = noise == table::GAUSSIAN;
  return args;
}

}  // namespace zo::cpu
