// The ops over segments, registered under zoengine_C for CUDA tensors.
#include "tensors.h"

namespace zo::cuda {
namespace {

Segments segments_of(const Tensor& x, const Tensor& starts, const Tensor& lengths) {
  return {x.const_data_ptr(), starts.const_data_ptr<int64_t>(), lengths.const_data_ptr<int64_t>(), starts.numel()};
}

Tensor segment_stats(const Tensor& x, const Tensor& starts, const Tensor& lengths) {
  OnDevice device(x);
  Segments segments = segments_of(x, starts, lengths);
  Tensor result = new_doubles({segments.count, 4}, x);
  Tensor workspace = new_doubles({stats_workspace(segments.count)}, x);  // freed on the stream that used it
  STD_CUDA_CHECK(launch_segment_stats(segments, type_of(x), workspace.mutable_data_ptr<double>(),
                                      result.mutable_data_ptr<double>(), device.stream));
  return result;
}

Tensor segment_dots(const Tensor& x, const Tensor& starts, const Tensor& lengths, const Factor& factor) {
  OnDevice device(x);
  Segments segments = segments_of(x, starts, lengths);
  Tensor result = new_doubles({segments.count}, x);
  Tensor workspace = new_doubles({dot_workspace(segments.count)}, x);
  STD_CUDA_CHECK(launch_segment_dot(segments, type_of(x), factor, workspace.mutable_data_ptr<double>(),
                                    result.mutable_data_ptr<double>(), device.stream));
  return result;
}

Tensor segment_dot(const Tensor& x, const Tensor& y, const Tensor& starts, const Tensor& lengths) {
  Factor factor{};
  factor.y = y.const_data_ptr();
  factor.y_type = type_of(y);
  return segment_dots(x, starts, lengths, factor);
}

Tensor segment_dot_noise(const Tensor& x, const Tensor& seed, const Tensor& starts, const Tensor& lengths,
                         int64_t offset, int64_t stream, int64_t noise) {
  Factor factor{};
  factor.seed = seed.const_data_ptr<int64_t>();
  factor.offset = static_cast<uint64_t>(offset);
  factor.stream = static_cast<uint32_t>(stream);
  factor.noise = static_cast<Noise>(noise);
  return segment_dots(x, starts, lengths, factor);
}

Tensor segment_histogram(const Tensor& x, const Tensor& starts, const Tensor& lengths, const Tensor& prefixes,
                         int64_t digit) {
  OnDevice device(x);
  const std::vector<int64_t> sizes{starts.numel(), kHistogramBins};
  Tensor counts = torch::stable::new_empty(x, {sizes.data(), sizes.size()}, ScalarType::Long);
  Histogram args{};
  args.segments = segments_of(x, starts, lengths);
  args.prefixes = prefixes.const_data_ptr<int64_t>();
  args.counts = counts.mutable_data_ptr<int64_t>();
  args.size = x.numel();
  args.digit = static_cast<int32_t>(digit);
  STD_CUDA_CHECK(launch_segment_histogram(args, type_of(x), device.stream));
  return counts;
}

void segment_noise_fill_(const Tensor& out, const Tensor& seed, const Tensor& starts, const Tensor& lengths,
                         const Tensor& indices, int64_t stream, int64_t noise) {
  OnDevice device(out);
  SegmentFill args{};
  args.out = out.mutable_data_ptr();
  args.starts = starts.const_data_ptr<int64_t>();
  args.lengths = lengths.const_data_ptr<int64_t>();
  args.indices = indices.const_data_ptr<int64_t>();
  args.seed = seed.const_data_ptr<int64_t>();
  args.count = starts.numel();
  args.size = out.numel();
  args.stream = static_cast<uint32_t>(stream);
  args.noise = static_cast<Noise>(noise);
  STD_CUDA_CHECK(launch_segment_fill(args, type_of(out), device.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zoengine_C, CUDA, m) {
  m.impl("segment_stats", TORCH_BOX(&segment_stats));
  m.impl("segment_dot", TORCH_BOX(&segment_dot));
  m.impl("segment_dot_noise", TORCH_BOX(&segment_dot_noise));
  m.impl("segment_histogram", TORCH_BOX(&segment_histogram));
  m.impl("segment_noise_fill_", TORCH_BOX(&segment_noise_fill_));
}

}  // namespace zo::cuda
