// The CPU half of zoengine_C: unpacks tensors, splits the work into whole units for torch's threads, and hands them to
// the kernels of the instruction set in use. The schemas stand in zoengine/ops/schema.py; arguments are checked there.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "noise_table.h"

namespace zo::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kUnitsPerThread = 8;   // below this a thread is not worth waking
constexpr int64_t kTilesPerThread = 64;  // the same for sums, which cost far less

Dtype dtype_of(const Tensor& tensor) {
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

int64_t size_of(Dtype dtype) { return dtype == kFloat32 ? 4 : 2; }

Key key_of(int64_t seed) {
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

// ---- add_noise ------------------------------------------------------------------------------------------------------

// x[0 .. count) stand at stream index offset; a null x reads as -0.
struct Range {
  const char* x;
  char* out;
  Dtype dtype;
  int64_t count;
  uint64_t offset;
  std::vector<const float*> states;
};

// A unit that reaches beyond the range: done on copies that are padded to a whole unit.
void partial_unit(const AddNoise& args, const Range& range, uint64_t unit, uint32_t* words) {
  const int64_t size = size_of(range.dtype);
  const uint64_t start = unit * kUnit;
  const int64_t skip = start < range.offset ? static_cast<int64_t>(range.offset - start) : 0;
  const int64_t first = start > range.offset ? static_cast<int64_t>(start - range.offset) : 0;  // in the range
  const int64_t count = std::min(range.count - first, kUnit - skip);

  alignas(64) char data[kUnit * sizeof(float)] = {};
  if (range.x) std::memcpy(data + skip * size, range.x + first * size, static_cast<size_t>(count * size));
  std::vector<float> copies(range.states.size() * kUnit);
  std::vector<const float*> states;
  for (size_t j = 0; j < range.states.size(); ++j) {
    float* copy = copies.data() + j * kUnit;
    std::memcpy(copy + skip, range.states[j] + first, static_cast<size_t>(count) * sizeof(float));
    states.push_back(copy);
  }
  kernels().add_noise[range.dtype](args, {range.x ? data : nullptr, data, states.data(), unit, 1}, words);
  std::memcpy(range.out + first * size, data + skip * size, static_cast<size_t>(count * size));
}

void run_units(const AddNoise& args, const Range& range, uint64_t begin, uint64_t end) {
  Aligned<uint32_t> words(args.term_count * kWordsPerTile);
  const uint64_t last = range.offset + static_cast<uint64_t>(range.count);
  if (begin < end && begin * kUnit < range.offset) partial_unit(args, range, begin++, words.get());
  const bool cut = begin < end && end * kUnit > last;
  if (cut) --end;
  if (begin < end) {
    const int64_t place = static_cast<int64_t>(begin * kUnit - range.offset);
    const int64_t bytes = place * size_of(range.dtype);
    std::vector<const float*> states = range.states;
    for (const float*& state : states) state += place;
    const Span span{range.x ? range.x + bytes : nullptr, range.out + bytes, states.data(), begin,
                    static_cast<int64_t>(end - begin)};
    kernels().add_noise[range.dtype](args, span, words.get());
  }
  if (cut) partial_unit(args, range, end, words.get());
}

void run(const AddNoise& args, const Range& range) {
  if (range.count == 0) return;
  const uint64_t begin = range.offset / kUnit;
  const uint64_t end = (range.offset + static_cast<uint64_t>(range.count) + kUnit - 1) / kUnit;
  torch::stable::parallel_for(0, static_cast<int64_t>(end - begin), kUnitsPerThread, [&](int64_t first, int64_t last) {
    run_units(args, range, begin + static_cast<uint64_t>(first), begin + static_cast<uint64_t>(last));
  });
}

void add_noise_out(const Tensor& x, const Tensor& seeds, const Tensor& coeffs, const std::vector<Tensor>& states,
                   const std::optional<Tensor>& keep, const std::optional<Tensor>& sr_seed, int64_t offset,
                   int64_t stream, int64_t noise, const Tensor& out) {
  const int64_t* seed = seeds.const_data_ptr<int64_t>();
  const float* coefficient = coeffs.const_data_ptr<float>();
  std::vector<Term> terms;
  for (int64_t k = 0; k < seeds.numel(); ++k) terms.push_back({key_of(seed[k]), coefficient[k]});
  Key rounding;
  if (sr_seed) rounding = key_of(*sr_seed->const_data_ptr<int64_t>());

  AddNoise args;
  args.terms = terms.data();
  args.term_count = seeds.numel();
  args.state_coefficients = coefficient + seeds.numel();
  args.state_count = static_cast<int64_t>(states.size());
  args.keep = keep ? keep->const_data_ptr<float>() : nullptr;
  args.rounding = sr_seed ? &rounding : nullptr;
  args.stream = static_cast<uint32_t>(stream);
  args.gaussian = noise == table::GAUSSIAN;

  Range range{static_cast<const char*>(x.const_data_ptr()), static_cast<char*>(out.mutable_data_ptr()), dtype_of(x),
              x.numel(), static_cast<uint64_t>(offset), {}};
  for (const Tensor& state : states) range.states.push_back(state.const_data_ptr<float>());
  run(args, range);
}

void add_noise_(const Tensor& x, const Tensor& seeds, const Tensor& coeffs, const std::vector<Tensor>& states,
                const std::optional<Tensor>& keep, const std::optional<Tensor>& sr_seed, int64_t offset,
                int64_t stream, int64_t noise) {
  add_noise_out(x, seeds, coeffs, states, keep, sr_seed, offset, stream, noise, x);
}

// The noise itself is one term of coefficient 1 added to -0, the only number that leaves every z as it is.
AddNoise fill_args(const Term& term, int64_t stream, int64_t noise) {
  AddNoise args{};
  args.terms = &term;
  args.term_count = 1;
  args.stream = static_cast<uint32_t>(stream);
  args.gaussian = noise == table::GAUSSIAN;
  return args;
}

void noise_fill_(const Tensor& out, const Tensor& seed, int64_t offset, int64_t stream, int64_t noise) {
  const Term term{key_of(*seed.const_data_ptr<int64_t>()), 1.0f};
  run(fill_args(term, stream, noise), {nullptr, static_cast<char*>(out.mutable_data_ptr()), dtype_of(out), out.numel(),
                                       static_cast<uint64_t>(offset), {}});
}

// ---- Sums over segments ---------------------------------------------------------------------------------------------

// The segments cut into tiles of 1024 counted from each segment's start, numbered through all segments.
struct Segments {
  const int64_t* starts;
  const int64_t* lengths;
  std::vector<int64_t> first_tile{0};  // of each segment, and the number of all

  Segments(const Tensor& starts_, const Tensor& lengths_)
      : starts(starts_.const_data_ptr<int64_t>()), lengths(lengths_.const_data_ptr<int64_t>()) {
    for (int64_t s = 0; s < starts_.numel(); ++s) first_tile.push_back(first_tile.back() + (lengths[s] + kTile - 1) / kTile);
  }

  int64_t count() const { return static_cast<int64_t>(first_tile.size()) - 1; }

  // For every tile, body(tile, start, count), where x[start .. start + count) are its elements. Each thread makes its
  // own body and calls it in rising order.
  template <class MakeBody>
  void for_tiles(const MakeBody& make_body) const {
    torch::stable::parallel_for(0, first_tile.back(), kTilesPerThread, [&](int64_t begin, int64_t end) {
      auto body = make_body();
      auto segment = std::upper_bound(first_tile.begin(), first_tile.end(), begin) - 1;
      for (int64_t tile = begin; tile < end; ++tile) {
        while (tile >= segment[1]) ++segment;
        const auto s = segment - first_tile.begin();
        const int64_t skip = (tile - *segment) * kTile;
        body(tile, starts[s] + skip, std::min<int64_t>(lengths[s] - skip, kTile));
      }
    });
  }
};

// The sum of tile sums, in the order of `ordered_sum`: 256 lanes, then a halving tree.
template <class Value>
double lane_sum(int64_t first, int64_t last, const Value& value) {
  double lanes[256] = {};
  for (int64_t i = first; i < last; ++i) lanes[(i - first) & 255] += value(i);
  for (int width = 128; width; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

void read_tile(const Tensor& x, int64_t start, int64_t count, float* tile) {
  const Dtype dtype = dtype_of(x);
  kernels().to_float[dtype](static_cast<const char*>(x.const_data_ptr()) + start * size_of(dtype), tile, count);
  std::fill(tile + count, tile + kTile, 0.0f);
}

Tensor new_doubles(std::vector<int64_t> sizes, const Tensor& like) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, ScalarType::Double);
}

Tensor segment_stats(const Tensor& x, const Tensor& starts, const Tensor& lengths) {
  const Segments segments(starts, lengths);
  std::vector<Stats> tiles(static_cast<size_t>(segments.first_tile.back()));
  segments.for_tiles([&] {
    return [&](int64_t tile, int64_t start, int64_t count) {
      alignas(64) float values[kTile];
      read_tile(x, start, count, values);
      tiles[static_cast<size_t>(tile)] = kernels().stats_tile(values, count);
    };
  });
  Tensor result = new_doubles({segments.count(), 4}, x);
  double* row = result.mutable_data_ptr<double>();
  for (int64_t s = 0; s < segments.count(); ++s, row += 4) {
    const int64_t first = segments.first_tile[static_cast<size_t>(s)];
    const int64_t last = segments.first_tile[static_cast<size_t>(s) + 1];
    row[0] = lane_sum(first, last, [&](int64_t i) { return tiles[static_cast<size_t>(i)].sum; });
    row[1] = lane_sum(first, last, [&](int64_t i) { return tiles[static_cast<size_t>(i)].square; });
    row[2] = std::numeric_limits<double>::infinity();
    row[3] = -row[2];
    for (int64_t i = first; i < last; ++i) {
      const Stats& stats = tiles[static_cast<size_t>(i)];
      row[2] = stats.low >= row[2] ? row[2] : stats.low;  // a NaN tile is taken,
      row[3] = stats.high <= row[3] ? row[3] : stats.high;
      if (stats.low != stats.low) break;  // and stays
    }
  }
  return result;
}

// The dot products of x with what a reader made by make_reader() gives: reader(start, count, float*).
template <class MakeReader>
Tensor segment_dots(const Tensor& x, const Tensor& starts, const Tensor& lengths, const MakeReader& make_reader) {
  const Segments segments(starts, lengths);
  std::vector<double> tiles(static_cast<size_t>(segments.first_tile.back()));
  segments.for_tiles([&] {
    return [&, read = make_reader()](int64_t tile, int64_t start, int64_t count) mutable {
      alignas(64) float values[kTile], others[kTile];
      read_tile(x, start, count, values);
      read(start, count, others);
      std::fill(others + count, others + kTile, 0.0f);
      tiles[static_cast<size_t>(tile)] = kernels().dot_tile(values, others);
    };
  });
  Tensor result = new_doubles({segments.count()}, x);
  double* dot = result.mutable_data_ptr<double>();
  for (int64_t s = 0; s < segments.count(); ++s) {
    dot[s] = lane_sum(segments.first_tile[static_cast<size_t>(s)], segments.first_tile[static_cast<size_t>(s) + 1],
                      [&](int64_t i) { return tiles[static_cast<size_t>(i)]; });
  }
  return result;
}

Tensor segment_dot(const Tensor& x, const Tensor& y, const Tensor& starts, const Tensor& lengths) {
  return segment_dots(x, starts, lengths, [&] {
    return [&](int64_t start, int64_t count, float* tile) { read_tile(y, start, count, tile); };
  });
}

// Reads noise piece by piece and makes each unit once while the pieces rise.
class NoiseReader {
 public:
  NoiseReader(const AddNoise& args, uint64_t offset) : args_(args), offset_(offset), words_(kWordsPerTile), unit_(kUnit) {}

  void operator()(int64_t start, int64_t count, float* out) {
    uint64_t index = offset_ + static_cast<uint64_t>(start);
    while (count > 0) {
      if (index / kUnit != held_) {
        held_ = index / kUnit;
        kernels().add_noise[kFloat32](args_, {nullptr, unit_.get(), nullptr, held_, 1}, words_.get());
      }
      const int64_t skip = static_cast<int64_t>(index % kUnit), n = std::min<int64_t>(count, kUnit - skip);
      std::copy_n(unit_.get() + skip, n, out);
      index += static_cast<uint64_t>(n);
      out += n;
      count -= n;
    }
  }

 private:
  const AddNoise& args_;
  uint64_t offset_;
  Aligned<uint32_t> words_;
  Aligned<float> unit_;
  uint64_t held_ = ~uint64_t{0};
};

Tensor segment_dot_noise(const Tensor& x, const Tensor& seed, const Tensor& starts, const Tensor& lengths,
                         int64_t offset, int64_t stream, int64_t noise) {
  const Term term{key_of(*seed.const_data_ptr<int64_t>()), 1.0f};
  const AddNoise args = fill_args(term, stream, noise);
  return segment_dots(x, starts, lengths, [&] { return NoiseReader(args, static_cast<uint64_t>(offset)); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zoengine_C, CPU, m) {
  m.impl("add_noise_", TORCH_BOX(&add_noise_));
  m.impl("add_noise_out", TORCH_BOX(&add_noise_out));
  m.impl("noise_fill_", TORCH_BOX(&noise_fill_));
  m.impl("segment_stats", TORCH_BOX(&segment_stats));
  m.impl("segment_dot", TORCH_BOX(&segment_dot));
  m.impl("segment_dot_noise", TORCH_BOX(&segment_dot_noise));
}

}  // namespace zo::cpu
