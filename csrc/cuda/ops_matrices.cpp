// The ops on matrices of a flat tensor, registered under zoengine_C for CUDA tensors.
#include "tensors.h"

namespace zo::cuda {
namespace {

Matrices matrices_of(const Tensor& table, int64_t blocks, int64_t widest) {
  return {table.const_data_ptr<int64_t>(), table.size(0), static_cast<int32_t>(table.size(1)), blocks, widest};
}

Tensor new_floats(std::vector<int64_t> sizes, const Tensor& like) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, ScalarType::Float);
}

Kron kron_terms(const Tensor& a, const Tensor& segments, const Tensor& seeds, const Tensor& coeffs, int64_t offset,
                int64_t noise, int64_t blocks, int64_t widest) {
  Kron args{};
  args.a = a.const_data_ptr<float>();
  args.seeds = seeds.const_data_ptr<int64_t>();
  args.coeffs = coeffs.const_data_ptr<float>();
  args.matrices = matrices_of(segments, blocks, widest);
  args.columns = a.numel();
  args.offset = static_cast<uint64_t>(offset);
  args.terms = static_cast<int32_t>(seeds.numel());
  args.noise = static_cast<Noise>(noise);
  return args;
}

// Launches with a workspace for the score, if there is one to be written.
void launch(Kron args, Type type, const std::optional<Tensor>& score, const Tensor& like, cudaStream_t stream) {
  if (!score) {
    STD_CUDA_CHECK(launch_kron(args, type, stream));
    return;
  }
  args.block_count = kron_score_blocks(args.matrices.blocks, args.matrices.widest);
  Tensor parts = new_floats({args.block_count * args.matrices.widest}, like);  // freed on the stream that used it
  Tensor totals = new_doubles({args.columns}, like);
  args.parts = parts.mutable_data_ptr<float>();
  args.totals = totals.mutable_data_ptr<double>();
  args.score = score->mutable_data_ptr<float>();
  STD_CUDA_CHECK(launch_kron(args, type, stream));
}

void kron_rows_out(const Tensor& x, const Tensor& a, const Tensor& kappa, const Tensor& segments, const Tensor& seeds,
                   const Tensor& coeffs, const std::optional<Tensor>& keep, const std::optional<Tensor>& sr_seed,
                   const std::optional<Tensor>& score, int64_t offset, int64_t noise, int64_t blocks, int64_t widest,
                   const Tensor& out) {
  OnDevice device(x);
  Kron args = kron_terms(a, segments, seeds, coeffs, offset, noise, blocks, widest);
  args.x = x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.kappa = kappa.const_data_ptr<float>();
  args.keep = pointer<float>(keep);
  args.rounding_seed = pointer<int64_t>(sr_seed);
  launch(args, type_of(x), score, x, device.stream);
}

void kron_rows_(const Tensor& x, const Tensor& a, const Tensor& kappa, const Tensor& segments, const Tensor& seeds,
                const Tensor& coeffs, const std::optional<Tensor>& keep, const std::optional<Tensor>& sr_seed,
                const std::optional<Tensor>& score, int64_t offset, int64_t noise, int64_t blocks, int64_t widest) {
  kron_rows_out(x, a, kappa, segments, seeds, coeffs, keep, sr_seed, score, offset, noise, blocks, widest, x);
}

Tensor kron_score(const Tensor& a, const Tensor& segments, const Tensor& seeds, const Tensor& coeffs, int64_t offset,
                  int64_t noise, int64_t blocks, int64_t widest) {
  OnDevice device(a);
  Tensor score = new_floats({a.numel()}, a);
  Kron args = kron_terms(a, segments, seeds, coeffs, offset, noise, blocks, widest);
  launch(args, Type::kFloat32, score, a, device.stream);
  return score;
}

void lowrank_add_out(const Tensor& x, const Tensor& left, const Tensor& right, const Tensor& segments,
                     const Tensor& coeff, const std::optional<Tensor>& keep, const std::optional<Tensor>& sr_seed,
                     int64_t offset, int64_t rank, int64_t blocks, int64_t widest, const Tensor& out) {
  OnDevice device(x);
  LowRank args{};
  args.x = x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.left = left.const_data_ptr<float>();
  args.right = right.const_data_ptr<float>();
  args.coeff = coeff.const_data_ptr<float>();
  args.keep = pointer<float>(keep);
  args.rounding_seed = pointer<int64_t>(sr_seed);
  args.matrices = matrices_of(segments, blocks, widest);
  args.offset = static_cast<uint64_t>(offset);
  args.rank = static_cast<int32_t>(rank);
  STD_CUDA_CHECK(launch_lowrank_add(args, type_of(x), device.stream));
}

void lowrank_add_(const Tensor& x, const Tensor& left, const Tensor& right, const Tensor& segments,
                  const Tensor& coeff, const std::optional<Tensor>& keep, const std::optional<Tensor>& sr_seed,
                  int64_t offset, int64_t rank, int64_t blocks, int64_t widest) {
  lowrank_add_out(x, left, right, segments, coeff, keep, sr_seed, offset, rank, blocks, widest, x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zoengine_C, CUDA, m) {
  m.impl("kron_rows_", TORCH_BOX(&kron_rows_));
  m.impl("kron_rows_out", TORCH_BOX(&kron_rows_out));
  m.impl("kron_score", TORCH_BOX(&kron_score));
  m.impl("lowrank_add_", TORCH_BOX(&lowrank_add_));
  m.impl("lowrank_add_out", TORCH_BOX(&lowrank_add_out));
}

}  // namespace zo::cuda
