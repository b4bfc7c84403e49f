// The ops on matrices (csrc/cuda/kron.cuh, lowrank.cuh) with blocks and threads as loops.
#include <vector>

#include "kron.cuh"
#include "lowrank.cuh"

namespace {

using namespace zo::cuda;

// The threads of a block, one after another.
struct Crew {
  template <class Work>
  void each(const Work& work) {
    for (int t = 0; t < kCrew; ++t) work(t);
  }
  template <class Store>
  void trees(int count, float* lanes, const Store& store) {
    for (int item = 0; item < count; ++item) {
      float* lane = lanes + item * kCrew;
      for (int width = kCrew / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
      }
      store(item, lane[0]);
    }
  }
};

template <class T>
void kron(Kron p, int64_t step) {
  // Vectors of 16 bytes, and what nobody writes must not be used.
  std::vector<Vector> memory(kron_shared(p.terms, p.capacity) / 4 + 1);
  float* shared = reinterpret_cast<float*>(memory.data());
  for (p.first_block = 0; p.first_block < p.matrices.blocks; p.first_block += step) {
    p.block_count = p.matrices.blocks - p.first_block < step ? p.matrices.blocks - p.first_block : step;
    for (int64_t block = 0; block < p.block_count; ++block) {
      for (Vector& v : memory) v = {{0x7FC00000u, 0x7FC00000u, 0x7FC00000u, 0x7FC00000u}};
      Crew crew;
      kron_block<T>(p, block, shared, crew);
    }
    for (int64_t c = 0; c < p.columns && p.parts != nullptr; ++c) score_column(p, c);
  }
}

template <class T>
void lowrank(const LowRank& p) {
  constexpr int kThreads = 256;
  std::vector<Vector> memory(kLowRankShared / 4);
  float* shared = reinterpret_cast<float*>(memory.data());
  for (int64_t b = 0; b < p.matrices.blocks; ++b) {
    const RowBlock block = row_block(p.matrices, b);
    for (int column = 0; column < block.columns; column += kTileColumns) {
      const LowRankTile tile(p, block, column);
      float sums[kThreads][kPatchRows][kPatchColumns] = {};
      for (int k = 0; k < p.rank; k += kRankStep) {
        const int depth = kRankStep < p.rank - k ? kRankStep : p.rank - k;
        for (int t = 0; t < kThreads; ++t) bring_factors(p, tile, k, depth, t, shared);
        for (int t = 0; t < kThreads; ++t) multiply_factors(shared, depth, t, sums[t]);
      }
      for (int t = 0; t < kThreads; ++t) finish_patch<T>(p, tile, t, sums[t]);
    }
  }
}

}  // namespace

// `step`: blocks of one launch.
extern "C" int zo_kron(const Kron* args, int type, int step) {
  if (type == 0) kron<Float32>(*args, step);
  if (type == 1) kron<BFloat16>(*args, step);
  if (type == 2) kron<Float16>(*args, step);
  return 0;
}

extern "C" int zo_lowrank_add(const LowRank* args, int type) {
  if (type == 0) lowrank<Float32>(*args);
  if (type == 1) lowrank<BFloat16>(*args);
  if (type == 2) lowrank<Float16>(*args);
  return 0;
}
