// The CPU kernels, written once over a machine (see csrc/noise.h) and compiled once per instruction set.
#pragma once

#include "add_noise.h"
#include "api.h"
#include "counts.h"
#include "kron.h"
#include "lowrank.h"
#include "rules.h"
#include "state_fold.h"
#include "sums.h"

namespace zo {
inline namespace ZO_ISA {

template <class V>
constexpr cpu::Kernels make_kernels(const char* name) {
  return {name,
          {add_noise<V, float>, add_noise<V, BFloat16>, add_noise<V, Float16>},
          {state_fold<V, float>, state_fold<V, BFloat16>, state_fold<V, Float16>},
          {rule_step<V, float>, rule_step<V, BFloat16>, rule_step<V, Float16>},
          {kron_rows<V, float>, kron_rows<V, BFloat16>, kron_rows<V, Float16>},
          {lowrank_rows<V, float>, lowrank_rows<V, BFloat16>, lowrank_rows<V, Float16>},
          {mask_below<V, float>, mask_below<V, BFloat16>, mask_below<V, Float16>},
          count_digits<V>,
          {to_float<V, float>, to_float<V, BFloat16>, to_float<V, Float16>},
          dot_tile<V>,
          stats_tile<V>};
}

}  // namespace ZO_ISA
}  // namespace zo
