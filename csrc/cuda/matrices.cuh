// Where a block of rows stands. Host code too.
#pragma once

#include "arguments.h"
#include "device_noise.cuh"

namespace zo::cuda {

constexpr int kRowBlock = 64;  // ROW_BLOCK of zoengine/ops/schema.py

// Up to 64 rows of one matrix.
struct RowBlock {
  int64_t matrix;  // which
  int64_t start;   // element of x where the first of the rows begins
  int64_t first;   // the first of the rows
  int32_t rows, columns;
  const int64_t* factors;  // the fields of the table behind the common four
};

// The last of the rows of `table` whose number in `field` is at most `value`; these numbers do not fall.
ZO_HD int64_t find_matrix(const Matrices& m, int field, int64_t value) {
  int64_t low = 0, high = m.count;  // the answer is in [low, high)
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    if (m.table[middle * m.fields + field] <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

ZO_HD RowBlock row_block(const Matrices& m, int64_t block) {
  RowBlock result;
  result.matrix = find_matrix(m, 3, block);
  const int64_t* fields = m.table + result.matrix * m.fields;
  result.first = (block - fields[3]) * kRowBlock;
  int64_t left = fields[1] - result.first;
  result.rows = static_cast<int32_t>(left < kRowBlock ? left : kRowBlock);
  result.columns = static_cast<int32_t>(fields[2]);
  result.start = fields[0] + result.first * fields[2];
  result.factors = fields + 4;
  return result;
}

}  // namespace zo::cuda
