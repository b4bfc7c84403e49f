// What the CUDA kernels are told, as plain data: neither torch nor CUDA, so that host tests can build the same bodies.
#pragma once

#include <cstdint>

namespace zo::cuda {

enum class Type : int32_t { kFloat32, kBFloat16, kFloat16 };
enum class Noise : int32_t { kGaussian, kRademacher };  // the integers of zoengine/noise/table.py

constexpr int kMaxStates = 2;
constexpr int kHistogramBins = 4096;

// What is done to the noise of every term, or to elements: the integers of zoengine/ops/schema.py.
enum class Transform : int32_t { kNone, kScale, kMask, kDiag };
enum class Rule : int32_t { kSign, kAdam, kAmsgrad, kAdamu, kHizoo, kAdamReplay };

// out = keep x + sum_k coeffs[k] z(seeds[k]) + sum_j coeffs[terms + j] states[j], in that order, rounded once; x == out
// is in place. Seeds, coefficients, keep and rounding_seed are device pointers: a CUDA graph sees new values at replay.
struct AddNoise {
  const void* x;
  void* out;
  const int64_t* seeds;
  const int64_t* streams;  // one per seed
  const float* coeffs;
  const float* states[kMaxStates];
  const float* keep;             // null: x as it is
  const int64_t* rounding_seed;  // null: round to nearest
  int64_t count;
  uint64_t offset;  // arena index of element 0
  uint32_t stream;  // of noise_fill
  int32_t terms;
  int32_t state_count;
};

// One pass over weights and states with K noise terms that does more than add them (fused.cuh says what). Every pointer
// is a device pointer; those an op does not use are null.
struct Fused {
  const void* x;
  void* out;  // x itself: in place
  float* states[3];
  const float* added[kMaxStates];  // added to the weights as they are
  const int64_t* seeds;
  const int64_t* streams;
  const float* coeffs;
  const float* numbers;            // of a rule; of a fold the K + 2 coefficients of the weights
  const float* keep;               // factor on x; null: none
  const float* state_keep;         // factor on a folded state; null: none
  const int64_t* rounding_seed;    // null: round to nearest
  const float* scale;              // a factor on the noise for each tile of the arena
  const uint8_t* bits;             // elements whose bit is 0 are copied; bit `first` belongs to element 0
  const float* diag;               // the noise is divided by its root
  const int32_t* valid;            // elements of each tile that count for `squares`
  double* squares;                 // sum of squares of each tile of the new state; null: not wanted
  int64_t count;
  int64_t first;
  uint64_t offset;  // arena index of element 0
  int32_t terms;
  Noise noise;
};

// Matrices in a flat tensor: the table of zoengine/ops/schema.py, `fields` (5 or 6) int64 for each.
struct Matrices {
  const int64_t* table;
  int64_t count;
  int32_t fields;
  int64_t blocks;  // of 64 rows, of all matrices together
  int64_t widest;  // most columns of any
};

// Rows x = keep x + sum_k coeffs[k] (u_k - kappa (a . u_k) a) of matrices, and what they add to the score of a.
struct Kron {
  const void* x;  // null: the score alone
  void* out;
  const float* a;
  const float* kappa;
  const int64_t* seeds;
  const float* coeffs;
  const float* keep;             // null: x as it is
  const int64_t* rounding_seed;  // null: round to nearest
  float* parts;                  // (blocks of this launch, widest): each block's share of the score; null: not wanted
  double* totals;                // one for each element of a: the score up to the blocks of this launch
  float* score;
  Matrices matrices;
  int64_t first_block, block_count;  // of this launch
  int64_t columns;                   // elements of a
  uint64_t offset;                   // arena index of x[0]
  int32_t terms;
  Noise noise;
  int32_t capacity;  // floats of shared memory for noise
};

// x = keep x + coeff left right' for matrices.
struct LowRank {
  const void* x;
  void* out;
  const float* left;
  const float* right;
  const float* coeff;
  const float* keep;             // null: x as it is
  const int64_t* rounding_seed;  // null: round to nearest
  Matrices matrices;
  uint64_t offset;
  int32_t rank;
};

// The segments x[starts[s] .. starts[s] + lengths[s]); the tables are device pointers and never read on the host.
struct Segments {
  const void* x;
  const int64_t* starts;
  const int64_t* lengths;
  int64_t count;
};

// out[starts[s] + i] = z at indices[s] + i.
struct SegmentFill {
  void* out;
  const int64_t* starts;
  const int64_t* lengths;
  const int64_t* indices;
  const int64_t* seed;
  int64_t count;
  int64_t size;  // elements of out
  uint32_t stream;
  Noise noise;
};

// How many elements of each segment have each value of one digit of |x|, and prefixes[s] as the bits above it.
struct Histogram {
  Segments segments;
  const int64_t* prefixes;
  int64_t* counts;  // (segments, 4096)
  int64_t size;     // elements of x
  int32_t digit;
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
