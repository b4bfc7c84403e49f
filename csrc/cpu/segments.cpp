// Sums and counts over segments on the CPU. Sums are taken in the order of `ordered_sum` in zoengine/ops/reference:
// tiles of 1024 values are summed in parallel, then each segment's tile sums in one go, so that no result depends on the
// number of threads.

#include <algorithm>
#include <limits>
#include <mutex>
#include <vector>

#include "lane_sum.h"
#include "tensors.h"

namespace zo::cpu {
namespace {

constexpr int64_t kTilesPerThread = 64;  // below this a thread is not worth waking

// The segments cut into tiles of 1024 counted from each segment's start, numbered through all segments.
struct Segments {
  const int64_t* starts;
  const int64_t* lengths;
  std::vector<int64_t> first_tile{0};  // of each segment, and the number of all

  Segments(const Tensor& starts_, const Tensor& lengths_)
      : starts(starts_.const_data_ptr<int64_t>()), lengths(lengths_.const_data_ptr<int64_t>()) {
    for (int64_t s = 0; s < starts_.numel(); ++s) {
      first_tile.push_back(first_tile.back() + (lengths[s] + kTile - 1) / kTile);
    }
  }

  int64_t count() const { return static_cast<int64_t>(first_tile.size()) - 1; }

  // body(s, first, last) for tiles first .. last - 1, all of segment s. Each thread makes its own body and calls it in
  // rising order.
  template <class MakeBody>
  void for_pieces(const MakeBody& make_body) const {
    torch::stable::parallel_for(0, first_tile.back(), kTilesPerThread, [&](int64_t begin, int64_t end) {
      auto body = make_body();
      auto segment = std::upper_bound(first_tile.begin(), first_tile.end(), begin) - 1;
      for (; begin < end; ++segment) {
        const int64_t stop = std::min(end, segment[1]);
        if (begin < stop) body(segment - first_tile.begin(), begin, stop);
        begin = stop;
      }
    });
  }

  // body(tile, start, count), where x[start .. start + count) are the tile's elements.
  template <class MakeBody>
  void for_tiles(const MakeBody& make_body) const {
    for_pieces([&] {
      return [this, body = make_body()](int64_t s, int64_t first, int64_t last) mutable {
        for (int64_t tile = first; tile < last; ++tile) {
          const int64_t skip = (tile - first_tile[static_cast<size_t>(s)]) * kTile;
          body(tile, starts[s] + skip, std::min<int64_t>(lengths[s] - skip, kTile));
        }
      };
    });
  }
};

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
  NoiseReader(const AddNoise& args, uint64_t offset)
      : args_(args), offset_(offset), words_(kWordsPerTile), unit_(kUnit) {}

  void operator()(int64_t start, int64_t count, float* out) {
    uint64_t index = offset_ + static_cast<uint64_t>(start);
    while (count > 0) {
      if (index / kUnit != held_) {
        held_ = index / kUnit;
        kernels().add_noise[kFloat32](args_, {nullptr, unit_.get(), nullptr, held_, 1, nullptr}, words_.get());
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
  const Term term = fill_term(seed, stream);
  const AddNoise args = fill_args(term, noise);
  return segment_dots(x, starts, lengths, [&] { return NoiseReader(args, static_cast<uint64_t>(offset)); });
}

constexpr int64_t kBins = 4096;

Tensor segment_histogram(const Tensor& x, const Tensor& starts, const Tensor& lengths, const Tensor& prefixes,
                         int64_t digit) {
  const Segments segments(starts, lengths);
  const int64_t sizes[] = {segments.count(), kBins};
  Tensor result = torch::stable::new_empty(x, {sizes, 2}, ScalarType::Long);
  int64_t* counts = result.mutable_data_ptr<int64_t>();
  std::fill_n(counts, segments.count() * kBins, 0);
  std::mutex adding;  // counts that several threads share; integers, so the order is all the same
  segments.for_pieces([&] {
    return [&, own = std::vector<int64_t>(kBins)](int64_t s, int64_t first, int64_t last) mutable {
      const int64_t begin = segments.first_tile[static_cast<size_t>(s)];
      const bool whole = first == begin && last == segments.first_tile[static_cast<size_t>(s) + 1];
      int64_t* row = counts + s * kBins;
      if (!whole) std::fill(own.begin(), own.end(), 0);
      for (int64_t tile = first; tile < last; ++tile) {
        alignas(64) float values[kTile];
        const int64_t skip = (tile - begin) * kTile, count = std::min<int64_t>(segments.lengths[s] - skip, kTile);
        read_tile(x, segments.starts[s] + skip, count, values);
        kernels().count_digits(values, count, static_cast<uint32_t>(prefixes.const_data_ptr<int64_t>()[s]),
                               static_cast<int>(digit), whole ? row : own.data());
      }
      if (whole) return;
      const std::lock_guard<std::mutex> lock(adding);
      for (int64_t bin = 0; bin < kBins; ++bin) row[bin] += own[static_cast<size_t>(bin)];
    };
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zoengine_C, CPU, m) {
  m.impl("segment_stats", TORCH_BOX(&segment_stats));
  m.impl("segment_dot", TORCH_BOX(&segment_dot));
  m.impl("segment_histogram", TORCH_BOX(&segment_histogram));
  m.impl("segment_dot_noise", TORCH_BOX(&segment_dot_noise));
}

}  // namespace zo::cpu
