// kron_rows_, kron_score and lowrank_add_ on the CPU: blocks of 64 rows of all matrices are shared among torch's
// threads, so that no result depends on their number.

#include <algorithm>
#include <optional>
#include <vector>

#include "tensors.h"

namespace zo::cpu {
namespace {

constexpr int64_t kElementsPerThread = 1 << 14;  // below this a thread is not worth waking
constexpr int64_t kScoreFloats = 1 << 22;        // sums of blocks that are alive at once, unless one matrix has more

// A row of `segments`: see zoengine/ops/schema.py.
struct Matrix {
  int64_t start, rows, columns, first_block, parts[2];

  int64_t blocks() const { return (rows + kRowBlock - 1) / kRowBlock; }
};

std::vector<Matrix> matrices_of(const Tensor& segments, int parts) {
  const int64_t* table = segments.const_data_ptr<int64_t>();
  std::vector<Matrix> found;
  for (int64_t s = 0; s < segments.numel() / (4 + parts); ++s, table += 4 + parts) {
    found.push_back({table[0], table[1], table[2], table[3], {table[4], table[3 + parts]}});
  }
  return found;
}

// body(s, first row, rows) for whole blocks of matrices first .. last - 1. Each thread makes its own body.
template <class MakeBody>
void for_rows(const std::vector<Matrix>& matrices, size_t first, size_t last, const MakeBody& make_body) {
  std::vector<int64_t> before{0};  // elements before each matrix
  for (size_t s = first; s < last; ++s) before.push_back(before.back() + matrices[s].rows * matrices[s].columns);
  torch::stable::parallel_for(0, before.back(), kElementsPerThread, [&](int64_t begin, int64_t end) {
    auto body = make_body();
    // The blocks whose first element lies in begin .. end - 1.
    auto s = static_cast<size_t>(std::upper_bound(before.begin(), before.end(), begin) - before.begin() - 1);
    for (; s < last - first && before[s] < end; ++s) {
      const Matrix& matrix = matrices[first + s];
      const int64_t block = kRowBlock * matrix.columns;
      if (!block) continue;
      const auto blocks_before = [&](int64_t element) {
        return std::clamp<int64_t>((element - before[s] + block - 1) / block, 0, matrix.blocks());
      };
      const int64_t row = blocks_before(std::max(begin, before[s])) * kRowBlock;
      const int64_t stop = std::min(blocks_before(end) * kRowBlock, matrix.rows);
      if (row < stop) body(first + s, row, stop - row);
    }
  });
}

MatrixRows rows_of(const Matrix& matrix, const char* x, char* out, int64_t size, int64_t offset, int64_t row,
                   int64_t rows) {
  const int64_t place = matrix.start + row * matrix.columns;
  return {x ? x + place * size : nullptr, out ? out + place * size : nullptr, static_cast<uint64_t>(offset + place),
          rows, matrix.columns};
}

int64_t window_of(int64_t widest) { return (widest / kUnit + 4) * kUnit; }

// score[column] = sum of the blocks' sums - weight rows a[column], in float64.
void add_blocks(const Matrix& matrix, const float* blocks, const float* a, double weight, float* score) {
  torch::stable::parallel_for(0, matrix.columns, 1024, [&](int64_t begin, int64_t end) {
    double totals[256];
    for (; begin < end; begin += 256) {
      const int64_t count = std::min<int64_t>(end - begin, 256);
      std::fill_n(totals, 256, 0.0);
      for (int64_t b = 0; b < matrix.blocks(); ++b) {
        const float* part = blocks + b * matrix.columns + begin;
        for (int64_t i = 0; i < count; ++i) totals[i] += static_cast<double>(part[i]);
      }
      const double factor = weight * static_cast<double>(matrix.rows);
      for (int64_t i = 0; i < count; ++i) {
        score[begin + i] = static_cast<float>(totals[i] - factor * static_cast<double>(a[begin + i]));
      }
    }
  });
}

struct KronTensors {
  const char* x;
  char* out;  // null: only the score
  Dtype dtype;
  const float* a;
  const float* kappa;
  float* score;  // or null
};

void run_kron(const Kron& args, const KronTensors& t, const std::vector<Matrix>& matrices, int64_t offset) {
  double weight = 0;
  for (int64_t k = 0; k < args.noise.count; ++k) weight += static_cast<double>(args.noise.terms[k].coefficient);
  const int64_t size = size_of(t.dtype);
  for (size_t first = 0, last; first < matrices.size(); first = last) {
    std::vector<int64_t> places{0};  // of each matrix's block sums
    for (last = first; last < matrices.size(); ++last) {
      const int64_t next = places.back() + matrices[last].blocks() * matrices[last].columns;
      if (t.score && last > first && next > kScoreFloats) break;
      places.push_back(next);
    }
    Aligned<float> sums(t.score ? places.back() : 0);
    for_rows(matrices, first, last, [&] {
      const int64_t terms = args.noise.count;
      auto words = std::make_shared<Aligned<uint32_t>>(std::max<int64_t>(terms, 1) * kWordsPerTile);
      auto floats = std::make_shared<Aligned<float>>((terms + 1) * args.window + 3 * terms);
      return [&, words, floats](size_t s, int64_t row, int64_t rows) {
        const Matrix& matrix = matrices[s];
        float* score = t.score ? sums.get() + places[s - first] + row / kRowBlock * matrix.columns : nullptr;
        const KronRows work{rows_of(matrix, t.x, t.out, size, offset, row, rows), t.a + matrix.parts[0],
                            t.kappa ? t.kappa[s] : 0.0f, score};
        kernels().kron_rows[t.dtype](args, work, {words->get(), floats->get()});
      };
    });
    for (size_t s = first; t.score && s < last; ++s) {
      const int64_t place = matrices[s].parts[0];
      add_blocks(matrices[s], sums.get() + places[s - first], t.a + place, weight, t.score + place);
    }
  }
}

Kron kron_args(const std::vector<Term>& terms, int64_t noise, int64_t widest) {
  return {{terms.data(), static_cast<int64_t>(terms.size()), noise == table::GAUSSIAN}, nullptr, nullptr,
          window_of(widest)};
}

void kron_rows_out(const Tensor& x, const Tensor& a, const Tensor& kappa, const Tensor& segments, const Tensor& seeds,
                   const Tensor& coeffs, const std::optional<Tensor>& keep, const std::optional<Tensor>& sr_seed,
                   const std::optional<Tensor>& score, int64_t offset, int64_t noise, int64_t, int64_t widest,
                   const Tensor& out) {
  const std::vector<Term> terms = direction_terms(seeds, coeffs);
  const Dtype dtype = dtype_of(x);
  const std::optional<Key> rounding = dtype == kFloat32 ? std::nullopt : rounding_key(sr_seed);
  Kron args = kron_args(terms, noise, widest);
  args.keep = pointer_of(keep);
  args.rounding = rounding ? &*rounding : nullptr;
  run_kron(args,
           {static_cast<const char*>(x.const_data_ptr()), static_cast<char*>(out.mutable_data_ptr()), dtype,
            a.const_data_ptr<float>(), kappa.const_data_ptr<float>(),
            score ? score->mutable_data_ptr<float>() : nullptr},
           matrices_of(segments, 1), offset);
}

void kron_rows_(const Tensor& x, const Tensor& a, const Tensor& kappa, const Tensor& segments, const Tensor& seeds,
                const Tensor& coeffs, const std::optional<Tensor>& keep, const std::optional<Tensor>& sr_seed,
                const std::optional<Tensor>& score, int64_t offset, int64_t noise, int64_t blocks, int64_t widest) {
  kron_rows_out(x, a, kappa, segments, seeds, coeffs, keep, sr_seed, score, offset, noise, blocks, widest, x);
}

Tensor kron_score(const Tensor& a, const Tensor& segments, const Tensor& seeds, const Tensor& coeffs, int64_t offset,
                  int64_t noise, int64_t, int64_t widest) {
  const std::vector<Term> terms = direction_terms(seeds, coeffs);
  Tensor score = torch::stable::empty_like(a);
  run_kron(kron_args(terms, noise, widest),
           {nullptr, nullptr, kFloat32, a.const_data_ptr<float>(), nullptr, score.mutable_data_ptr<float>()},
           matrices_of(segments, 1), offset);
  return score;
}

// A right factor (columns, rank) as panels of (rank, kPanel).
void make_panels(const float* right, int64_t columns, int64_t rank, float* panels) {
  const int64_t count = (columns + kPanel - 1) / kPanel;
  torch::stable::parallel_for(0, count, std::max<int64_t>(kElementsPerThread / (rank * kPanel), 1),
                              [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      float* panel = panels + p * rank * kPanel;
      for (int64_t column = 0; column < kPanel; ++column) {
        const int64_t from = p * kPanel + column;
        for (int64_t k = 0; k < rank; ++k) {
          panel[k * kPanel + column] = from < columns ? right[from * rank + k] : 0.0f;
        }
      }
    }
  });
}

void lowrank_add_out(const Tensor& x, const Tensor& left, const Tensor& right, const Tensor& segments,
                     const Tensor& coeff, const std::optional<Tensor>& keep, const std::optional<Tensor>& sr_seed,
                     int64_t offset, int64_t rank, int64_t, int64_t widest, const Tensor& out) {
  const std::vector<Matrix> matrices = matrices_of(segments, 2);
  const Dtype dtype = dtype_of(x);
  const std::optional<Key> rounding = dtype == kFloat32 ? std::nullopt : rounding_key(sr_seed);
  const LowRank args{*coeff.const_data_ptr<float>(), pointer_of(keep), rounding ? &*rounding : nullptr, rank,
                     window_of(widest)};
  std::vector<int64_t> places{0};  // of each matrix's panels
  for (const Matrix& matrix : matrices) {
    places.push_back(places.back() + (matrix.columns + kPanel - 1) / kPanel * kPanel * rank);
  }
  Aligned<float> panels(places.back());
  for (size_t s = 0; s < matrices.size(); ++s) {
    make_panels(right.const_data_ptr<float>() + matrices[s].parts[1], matrices[s].columns, rank,
                panels.get() + places[s]);
  }
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  for_rows(matrices, 0, matrices.size(), [&] {
    auto floats = std::make_shared<Aligned<float>>(args.window + kGroupRows * (widest + kPanel));
    return [&, floats](size_t s, int64_t row, int64_t rows) {
      const LowRankRows work{rows_of(matrices[s], from, to, size_of(dtype), offset, row, rows),
                             left.const_data_ptr<float>() + matrices[s].parts[0] + row * rank,
                             panels.get() + places[s]};
      kernels().lowrank_rows[dtype](args, work, {nullptr, floats->get()});
    };
  });
}

void lowrank_add_(const Tensor& x, const Tensor& left, const Tensor& right, const Tensor& segments,
                  const Tensor& coeff, const std::optional<Tensor>& keep, const std::optional<Tensor>& sr_seed,
                  int64_t offset, int64_t rank, int64_t blocks, int64_t widest) {
  lowrank_add_out(x, left, right, segments, coeff, keep, sr_seed, offset, rank, blocks, widest, x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zoengine_C, CPU, m) {
  m.impl("kron_rows_", TORCH_BOX(&kron_rows_));
  m.impl("kron_rows_out", TORCH_BOX(&kron_rows_out));
  m.impl("kron_score", TORCH_BOX(&kron_score));
  m.impl("lowrank_add_", TORCH_BOX(&lowrank_add_));
  m.impl("lowrank_add_out", TORCH_BOX(&lowrank_add_out));
}

}  // namespace zo::cpu
