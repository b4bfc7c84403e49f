// The fused ops (csrc/cuda/fused.cuh) with the grid as a loop over units and threads.
#include "fused_ops.cuh"

namespace {

using namespace zo::cuda;
namespace table = zo::table;

bool misaligned = false;

template <class Op>
void run(const Fused& args) {
  constexpr int kThreads = 32;
  const int bytes = sizeof(typename Op::Type::Bits);
  for_spans(args, bytes, [bytes](const Fused& p, const Span& span) {
    if (span.whole_first < span.whole_end) {
      const int64_t first = span.whole_first * kFusedUnit - span.skew;
      for (const float* state : {static_cast<const float*>(p.states[0]), static_cast<const float*>(p.states[1]),
                                 static_cast<const float*>(p.states[2]), p.added[0], p.added[1], p.diag}) {
        misaligned |= state != nullptr && reinterpret_cast<uint64_t>(state + first) % 16 != 0;
      }
      misaligned |= p.x != nullptr && ((reinterpret_cast<uint64_t>(p.x) + first * bytes) % (4 * bytes) != 0 ||
                                       (reinterpret_cast<uint64_t>(p.out) + first * bytes) % (4 * bytes) != 0);
    }
    const Op op(p);
    for (uint32_t unit = 0; unit < span.units; ++unit) {
      double squares[kThreads][2][kPartLanes];
      for (int thread = 0; thread < kThreads; ++thread) {
        Turn turn(p, span);
        if (unit >= span.whole_first && unit < span.whole_end) {
          fused_unit<Op, kPartLanes>(p, span, op, turn, unit, thread, squares[thread]);
        } else {
          fused_unit<Op, 1>(p, span, op, turn, unit, thread, squares[thread]);
        }
      }
      for (int half = 0; half < 2 && Op::kSquares && p.squares != nullptr; ++half) {
        for (int width = kThreads / 2; width > 0; width /= 2) {
          for (int thread = 0; thread < width; ++thread) {
            for (int j = 0; j < kPartLanes; ++j) squares[thread][half][j] += squares[thread + width][half][j];
          }
        }
        const double* lane = squares[0][half];
        const int64_t tile = tile_of(p, span, unit, half);
        if (tile >= 0) p.squares[tile] = (lane[0] + lane[2]) + (lane[1] + lane[3]);
      }
    }
  });
}

template <class T>
void transformed(const Fused& p, int transform) {
  if (transform == 1) run<AddTransformed<T, Transform::kScale>>(p);
  if (transform == 2) run<AddTransformed<T, Transform::kMask>>(p);
  if (transform == 3) run<AddTransformed<T, Transform::kDiag>>(p);
}

template <class T>
void rule(const Fused& p, int number) {
  if (number == 0) run<RuleOp<T, Rule::kSign>>(p);
  if (number == 1) run<RuleOp<T, Rule::kAdam>>(p);
  if (number == 2) run<RuleOp<T, Rule::kAmsgrad>>(p);
  if (number == 3) run<RuleOp<T, Rule::kAdamu>>(p);
  if (number == 4) run<RuleOp<T, Rule::kHizoo>>(p);
  if (number == 5) run<RuleOp<T, Rule::kAdamReplay>>(p);
}

}  // namespace

extern "C" int zo_transformed(const Fused* args, int type, int transform) {
  misaligned = false;
  if (type == 0) transformed<Float32>(*args, transform);
  if (type == 1) transformed<BFloat16>(*args, transform);
  if (type == 2) transformed<Float16>(*args, transform);
  return misaligned;
}

extern "C" int zo_state_fold(const Fused* args, int type) {
  misaligned = false;
  if (args->x == nullptr) run<Fold<Float32, false>>(*args);
  else if (type == 0) run<Fold<Float32, true>>(*args);
  else if (type == 1) run<Fold<BFloat16, true>>(*args);
  else run<Fold<Float16, true>>(*args);
  return misaligned;
}

extern "C" int zo_rule_step(const Fused* args, int type, int number) {
  misaligned = false;
  if (type == 0) rule<Float32>(*args, number);
  if (type == 1) rule<BFloat16>(*args, number);
  if (type == 2) rule<Float16>(*args, number);
  return misaligned;
}
