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

// z of some terms over the same elements.
struct Noise {
  const Term* terms;
  int64_t count;
  bool gaussian;  // else rademacher
};

enum Transform { kPlain, kScale, kMask, kDiag };  // the numbers are those of zoengine/ops/schema.py

// The arguments of add_noise that do not depend on the place. The sums are
//   acc = x * keep;  acc = fma(coefficient, T(z), acc) per term;  acc = fma(coefficient, state, acc) per state.
struct AddNoise {
  const Term* terms;
  int64_t term_count;
  const float* state_coefficients;
  int64_t state_count;
  const float* keep;    // null: do not multiply
  const Key* rounding;  // null: round to nearest
  bool gaussian;  // else rademacher
  Transform transform;
};

// `units` whole units starting at stream index first_unit * kUnit, at these addresses. x may be out; a null x reads as
// -0, to which adding z gives z itself.
struct Span {
  const void* x;
  void* out;
  const float* const* states;
  uint64_t first_unit;
  int64_t units;
  const void* operand;  // of the transform: a float for each tile, a bit for each element or a float for each
};

// The arguments of state_fold and of rule_step that do not depend on the place.
struct StateFold {
  Noise noise;
  const float* keep;            // null: do not multiply
  const float* x_coefficients;  // of each term, the old state and the new one
  const float* x_keep;
  const Key* rounding;  // of x; null: to nearest
};

enum Rule { kSign, kAdam, kAmsgrad, kAdamu, kHizoo, kAdamReplay };  // the numbers are those of the schema

struct RuleStep {
  Noise noise;
  const float* coefficients;
  const float* scalars;
  const float* keep;
  const Key* rounding;
  Rule rule;
};

constexpr int kMostStates = 3;

// `units` whole units of weights and states, all of them written. A null x is left out.
struct Update {
  void* x;
  float* states[kMostStates];
  uint64_t first_unit;
  int64_t units;
  const int32_t* valid;  // of each tile: how many elements count for its sum of squares; null: no sums
  double* squares;       // of each tile
};

// Buffers of kWordsPerTile for each term, aligned to 64 bytes.
struct Scratch {
  uint32_t* words;
  float* z;  // matrices: one window for the rounding, then one for each term, or kGroupRows
};

constexpr int kRowBlock = 64;  // rows of a matrix that are one piece of work
constexpr int kGroupRows = 16; // rows of a low-rank product that wait in scratch, at most
constexpr int kPanel = 32;     // columns of a matrix whose right factors stand together, padded with zeros

// Rows of a matrix one after another, from a multiple of kRowBlock on.
struct MatrixRows {
  const void* x;
  void* out;  // null: only the score is wanted
  uint64_t index;
  int64_t rows, columns;
};

// Rows u to x keep + sum_k coefficient_k (u - kappa (a . u) a).
struct Kron {
  Noise noise;
  const float* keep;
  const Key* rounding;
  int64_t window;  // floats that hold any row and the tiles it ends in
};

struct KronRows {
  MatrixRows rows;
  const float* a;
  float kappa;
  float* score;  // fp32 sums of each block, `columns` each, or null
};

// Rows to x keep + coefficient left right'.
struct LowRank {
  float coefficient;
  const float* keep;
  const Key* rounding;
  int64_t rank;
  int64_t window;
};

struct LowRankRows {
  MatrixRows rows;
  const float* left;   // (rows, rank)
  const float* right;  // panels of (rank, kPanel)
};

struct Stats {
  double sum, square, low, high;
};

struct Kernels {
  const char* name;
  // `words` is scratch of kWordsPerTile per term, aligned to 64 bytes.
  void (*add_noise[kDtypes])(const AddNoise&, const Span&, uint32_t* words);
  void (*state_fold[kDtypes])(const StateFold&, const Update&, Scratch);
  void (*rule_step[kDtypes])(const RuleStep&, const Update&, Scratch);
  void (*kron_rows[kDtypes])(const Kron&, const KronRows&, Scratch);
  void (*lowrank_rows[kDtypes])(const LowRank&, const LowRankRows&, Scratch);
  // A byte of `bits` for each eight of `count` values.
  void (*mask_below[kDtypes])(const void* x, int64_t count, float threshold, uint8_t* bits);
  // Into the counts of segment_histogram.
  void (*count_digits)(const float* x, int64_t count, uint32_t prefix, int digit, int64_t* counts);
  // Up to kTile values to fp32.
  void (*to_float[kDtypes])(const void* values, float* out, int64_t count);
  // Over kTile values, in the order of `ordered_sum` in zoengine/ops/reference/segments.py.
  double (*dot_tile)(const float* x, const float* y);
  // The first `count` values are the segment's, the rest are 0. Low and high are NaN if any value is.
  Stats (*stats_tile)(const float* x, int64_t count);
};

// Null where this build or this CPU cannot run them.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace zo::cpu
