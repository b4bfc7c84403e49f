// Elementwise kernels see whole units only. Here a range of the arena is cut into units, shared among torch's threads,
// and a unit that reaches beyond the range is done on padded copies.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "tensors.h"

namespace zo::cpu {

constexpr int64_t kUnitsPerThread = 8;  // below this a thread is not worth waking

// One operand of a kernel: `bits` for each element of the range, or for each tile that the range touches. A null
// operand stays null.
struct Operand {
  const void* data;
  int64_t bits;
  bool per_tile = false;
  bool written = false;
};

inline Operand values_of(const void* data, Dtype dtype) { return {data, 8 * size_of(dtype)}; }
inline Operand written(Operand operand) {
  operand.written = true;
  return operand;
}

template <size_t n>
struct Range {
  std::array<Operand, n> operands;
  int64_t count;
  uint64_t offset;

  uint64_t first_unit() const { return offset / kUnit; }
  uint64_t last_unit() const {
    return count ? (offset + static_cast<uint64_t>(count) + kUnit - 1) / kUnit : first_unit();
  }
};

// Where the operands of some units start.
template <size_t n>
using Places = std::array<char*, n>;

inline void copy_bits(const char* from, int64_t first, int64_t count, char* to, int64_t place) {
  if ((first | count | place) % 8 == 0) {
    std::memcpy(to + place / 8, from + first / 8, static_cast<size_t>(count / 8));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = place + i;
    to[at / 8] = static_cast<char>(to[at / 8] | ((from[(first + i) / 8] >> ((first + i) % 8) & 1) << at % 8));
  }
}

// A unit on copies; body(places, unit, units).
template <size_t n, class Body>
void padded_unit(const Range<n>& range, uint64_t unit, Body& body) {
  struct Copy {
    int64_t first, count, place;  // in elements or tiles: of the range, how many, of the copy
  };
  const auto cut = [&](uint64_t begin, uint64_t end, uint64_t from, uint64_t to) {  // [from, to) of [begin, end)
    const uint64_t low = std::max(begin, from), high = std::min(end, to);
    return Copy{static_cast<int64_t>(low - begin), static_cast<int64_t>(high - low), static_cast<int64_t>(low - from)};
  };
  const uint64_t last = range.offset + static_cast<uint64_t>(range.count);
  const Copy elements = cut(range.offset, last, unit * kUnit, (unit + 1) * kUnit);
  const Copy tiles = cut(range.offset / kTile, (last + kTile - 1) / kTile, 2 * unit, 2 * unit + 2);

  Aligned<char> memory(static_cast<int64_t>(n) * kUnit * 4);
  char* free = memory.get();
  Places<n> places{};
  for (size_t i = 0; i < n; ++i) {
    const Operand& operand = range.operands[i];
    if (!operand.data) continue;
    const Copy& copy = operand.per_tile ? tiles : elements;
    places[i] = free;
    free += kUnit * 4;
    std::memset(places[i], 0, static_cast<size_t>((operand.per_tile ? 2 : kUnit) * operand.bits + 7) / 8);
    copy_bits(static_cast<const char*>(operand.data), copy.first * operand.bits, copy.count * operand.bits, places[i],
              copy.place * operand.bits);
  }
  body(places, unit, int64_t{1});
  for (size_t i = 0; i < n; ++i) {
    const Operand& operand = range.operands[i];
    if (!operand.data || !operand.written) continue;
    const Copy& copy = operand.per_tile ? tiles : elements;
    const int64_t size = operand.bits / 8;
    std::memcpy(static_cast<char*>(const_cast<void*>(operand.data)) + copy.first * size, places[i] + copy.place * size,
                static_cast<size_t>(copy.count * size));
  }
}

// Units begin .. end - 1.
template <size_t n, class Body>
void run_units(const Range<n>& range, uint64_t begin, uint64_t end, Body& body) {
  const uint64_t last = range.offset + static_cast<uint64_t>(range.count);
  // Strings of bits must start at a whole byte.
  const bool bytes = std::all_of(range.operands.begin(), range.operands.end(),
                                 [&](const Operand& o) { return !o.data || o.bits % 8 == 0 || range.offset % 8 == 0; });
  uint64_t whole = begin, stop = bytes ? std::min(end, last / kUnit) : begin;
  if (whole * kUnit < range.offset) ++whole;
  stop = std::max(stop, std::min(whole, end));
  for (uint64_t unit = begin; unit < std::min(whole, end); ++unit) padded_unit(range, unit, body);
  if (whole < stop) {
    const int64_t place = static_cast<int64_t>(whole * kUnit - range.offset);
    const int64_t tile = static_cast<int64_t>(2 * whole - range.offset / kTile);
    Places<n> places{};
    for (size_t i = 0; i < n; ++i) {
      const Operand& operand = range.operands[i];
      const int64_t skipped = operand.bits * (operand.per_tile ? tile : place) / 8;
      if (operand.data) places[i] = static_cast<char*>(const_cast<void*>(operand.data)) + skipped;
    }
    body(places, whole, static_cast<int64_t>(stop - whole));
  }
  for (uint64_t unit = stop; unit < end; ++unit) padded_unit(range, unit, body);
}

// All units of some ranges; each thread makes its own body.
template <size_t n, class MakeBody>
void run(const std::vector<Range<n>>& ranges, const MakeBody& make_body) {
  std::vector<int64_t> before{0};  // units before each range
  for (const Range<n>& range : ranges) {
    before.push_back(before.back() + static_cast<int64_t>(range.last_unit() - range.first_unit()));
  }
  torch::stable::parallel_for(0, before.back(), kUnitsPerThread, [&](int64_t begin, int64_t end) {
    auto body = make_body();
    auto s = static_cast<size_t>(std::upper_bound(before.begin(), before.end(), begin) - before.begin() - 1);
    for (; begin < end; ++s) {
      const int64_t stop = std::min(end, before[s + 1]);
      const auto unit = [&](int64_t i) { return ranges[s].first_unit() + static_cast<uint64_t>(i - before[s]); };
      if (begin < stop) run_units(ranges[s], unit(begin), unit(stop), body);
      begin = stop;
    }
  });
}

}  // namespace zo::cpu
