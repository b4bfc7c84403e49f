// What the instruction-set-specific files offer to the ops: plain data and function pointers, no inline code.
#pragma once

#include <cstdint>

namespace zo::cpu {

constexpr int kTile = 1024;        // elements of a gaussian tile
constexpr int kUnit = 2 * kTile;   // the work of one step: two gaussian tiles share one rounding tile
constexpr int kWordsPerTile = 4 * 256;
constexpr int kRounds = 10;

enum Dtype { kFloat32, kBFloat16, kFloat16, kDtypes };

// The round keys of one seed.
struct Key {
  uint32_t k0[kRounds], k1[kRounds];
};

struct Term {
  Key key;
  uint32_t stream;
  float coefficient;
};

// The arguments of add_noise that do not depend on the place. The sums are
//   acc = x * keep;  acc = fma(coefficient, z, acc) per term;  acc = fma(coefficient, state, acc) per state.
struct AddNoise {
  const Term* terms;
  int64_t term_count;
  const float* state_coefficients;
  int64_t state_count;
  const float* keep;    // null: do not multiply
  const Key* rounding;  // null: round to nearest
  bool gaussian;  // else rademacher
};

// `units` whole units starting at stream index first_unit * kUnit, at these addresses. x may be out; a null x reads as
// -0, to which adding z gives z itself.
struct Span {
  const void* x;
  void* out;
  const float* const* states;
  uint64_t first_unit;
  int64_t units;
};

struct Stats {
  double sum, square, low, high;
};

struct Kernels {
  const char* name;
  // `words` is scratch of kWordsPerTile per term, aligned to 64 bytes.
  void (*add_noise[kDtypes])(const AddNoise&, const Span&, uint32_t* words);
  // Up to kTile values to fp32.
  void (*to_float[kDtypes])(const void* values, float* out, int64_t count);
  // Over kTile values, in the order of `ordered_sum` in zoengine/ops/reference.py.
  double (*dot_tile)(const float* x, const float* y);
  // The first `count` values are the segment's, the rest are 0. Low and high are NaN if any value is.
  Stats (*stats_tile)(const float* x, int64_t count);
};

// Null where this build or this CPU cannot run them.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace zo::cpu
