// The bodies of the CUDA kernels as host code: what the grid does in parallel is done in a loop, so that a machine
// without a GPU can compare index arithmetic, cut ranges and summation order with the reference.
#include "elementwise.cuh"
#include "segments.cuh"

namespace {

using namespace zo::cuda;
namespace table = zo::table;

bool misaligned = false;  // a vector access at an address that a GPU would refuse

template <class C>
void elementwise(const AddNoise& args) {
  for_ranges<C>(args, [](const AddNoise& p, const Range<C>& range) {
    const Shared<C> shared(p, range);
    if (range.whole_first < range.whole_end) {
      const uint64_t first = range.whole_first * static_cast<uint64_t>(C::kUnit) - static_cast<uint64_t>(range.skew);
      const uint64_t bytes = first * sizeof(typename C::Type::Bits);
      misaligned |= (reinterpret_cast<uint64_t>(p.x) + bytes) % 16 || (reinterpret_cast<uint64_t>(p.out) + bytes) % 16;
      for (int s = 0; s < p.state_count; ++s) misaligned |= reinterpret_cast<uint64_t>(p.states[s] + first) % 16 != 0;
    }
    for (uint32_t unit = range.whole_first; unit < range.whole_end; ++unit) {
      for (int thread = 0; thread < C::kThreads; ++thread) whole_unit<C>(p, range, shared, unit, thread);
    }
    for (uint32_t i = 0; i < range.cut_units(); ++i) {
      for (uint32_t lane = 0; lane < table::LANES; ++lane) cut_unit<C>(p, range, range.cut_unit(i), lane);
    }
  });
}

template <class T, Noise noise, bool stochastic>
void by_terms(const AddNoise& p) {
  const bool plain = p.keep == nullptr && p.state_count == 0;
  if (plain && p.terms == 1) return elementwise<Config<T, noise, stochastic, 1>>(p);
  if constexpr (noise == Noise::kGaussian) {
    if (plain && p.terms == 2) return elementwise<Config<T, noise, stochastic, 2>>(p);
  }
  elementwise<Config<T, noise, stochastic, 0>>(p);
}

template <class T, Noise noise>
void by_rounding(const AddNoise& p, bool fill) {
  if (fill) return elementwise<Config<T, noise, false, 1, true>>(p);
  if constexpr (T::kPerWord == 2) {
    if (p.rounding_seed != nullptr) return by_terms<T, noise, true>(p);
  }
  by_terms<T, noise, false>(p);
}

template <class T>
void by_noise(const AddNoise& p, int noise, bool fill) {
  noise == 0 ? by_rounding<T, Noise::kGaussian>(p, fill) : by_rounding<T, Noise::kRademacher>(p, fill);
}

// The five lower levels of the tree, which are warp shuffles on the device.
template <class Result>
Result tree(Result* values, int width) {
  for (width /= 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) values[i].append(values[i + width]);
  }
  return values[0];
}

template <class Source>
void segments(const Segments& args, const Factor& factor, double* out) {
  using Result = typename Source::Result;
  const Source source(args, factor);
  for (int64_t s = 0; s < args.count; ++s) {
    const int64_t tiles = (args.lengths[s] + kTile - 1) / kTile;
    Result lanes[table::LANES];
    for (int64_t tile = 0; tile < tiles; ++tile) {
      Result threads[kWarp];
      const int64_t left = args.lengths[s] - tile * kTile;
      for (int t = 0; t < kWarp; ++t) {
        threads[t] = source(args.starts[s] + tile * kTile, left < kTile ? left : kTile, t);
      }
      lanes[tile % table::LANES].append(tree(threads, kWarp));
    }
    tree(lanes, table::LANES).store(out + s * Result::kDoubles);
  }
}

template <class T>
void by_factor(const Segments& args, const Factor* factor, double* out) {
  if (factor == nullptr) return segments<StatsSource<T>>(args, {}, out);
  if (factor->y == nullptr) {
    return factor->noise == Noise::kGaussian ? segments<NoiseSource<T, Noise::kGaussian>>(args, *factor, out)
                                             : segments<NoiseSource<T, Noise::kRademacher>>(args, *factor, out);
  }
  switch (factor->y_type) {
    case Type::kFloat32:
      return segments<DotSource<T, Float32>>(args, *factor, out);
    case Type::kBFloat16:
      return segments<DotSource<T, BFloat16>>(args, *factor, out);
    case Type::kFloat16:
      return segments<DotSource<T, Float16>>(args, *factor, out);
  }
}

}  // namespace

extern "C" int zo_elementwise(const AddNoise* args, int type, int noise, int fill) {
  misaligned = false;
  if (type == 0) by_noise<Float32>(*args, noise, fill != 0);
  if (type == 1) by_noise<BFloat16>(*args, noise, fill != 0);
  if (type == 2) by_noise<Float16>(*args, noise, fill != 0);
  return misaligned;
}

extern "C" int zo_segments(const Segments* args, int type, const Factor* factor, double* out) {
  if (type == 0) by_factor<Float32>(*args, factor, out);
  if (type == 1) by_factor<BFloat16>(*args, factor, out);
  if (type == 2) by_factor<Float16>(*args, factor, out);
  return 0;
}
