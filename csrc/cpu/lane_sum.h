// The sum of tile sums.
#pragma once

#include <cstdint>

namespace zo::cpu {

// value(first) + ... + value(last - 1) in the order of `ordered_sum` in zoengine/ops/reference: 256 lanes, then a
// halving tree.
template <class Value>
double lane_sum(int64_t first, int64_t last, const Value& value) {
  double lanes[256] = {};
  for (int64_t i = first; i < last; ++i) lanes[(i - first) & 255] += value(i);
  for (int width = 128; width; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

}  // namespace zo::cpu
