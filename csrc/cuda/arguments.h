// What the CUDA kernels are told, as plain data: neither torch nor CUDA, so that host tests can build the same bodies.
#pragma once

#include <cstdint>

namespace zo::cuda {

enum class Type : int32_t { kFloat32, kBFloat16, kFloat16 };
enum class Noise : int32_t { kGaussian, kRademacher };  // the integers of zoengine/noise/table.py

constexpr int kMaxStates = 2;

// out = keep x + sum_k coeffs[k] z(seeds[k]) + sum_j coeffs[terms + j] states[j], in that order, rounded once; x == out
// is in place. Seeds, coefficients, keep and rounding_seed are device pointers: a CUDA graph sees new values at replay.
struct AddNoise {
  const void* x;
  void* out;
  const int64_t* seeds;
  const float* coeffs;
  const float* states[kMaxStates];
  const float* keep;             // null: x as it is
  const int64_t* rounding_seed;  // null: round to nearest
  int64_t count;
  uint64_t offset;  // arena index of element 0
  uint32_t stream;
  int32_t terms;
  int32_t state_count;
};

// The segments x[starts[s] .. starts[s] + lengths[s]); the tables are device pointers and never read on the host.
struct Segments {
  const void* x;
  const int64_t* starts;
  const int64_t* lengths;
  int64_t count;
};

// What x is multiplied with in a dot product: the values y, or the noise of `seed` if y is null.
struct Factor {
  const void* y;
  Type y_type;
  const int64_t* seed;
  uint64_t offset;  // arena index of x[0]
  uint32_t stream;
  Noise noise;
};

}  // namespace zo::cuda
