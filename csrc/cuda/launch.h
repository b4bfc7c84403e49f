// How the kernels are started. No torch here: everything that knows torch stands in ops*.cpp.
//
// Each function enqueues its kernels on `stream` of the current device, neither allocates nor synchronises, and returns
// the launch error.
#pragma once

#include <cuda_runtime_api.h>

#include "arguments.h"

namespace zo::cuda {

// cudaSuccess if the current device can run the kernels that were built.
cudaError_t check_device();

cudaError_t launch_add_noise(const AddNoise& args, Type type, Noise noise, cudaStream_t stream);

// args.x, coeffs, states, keep and rounding_seed are not read; args.terms is 1.
cudaError_t launch_noise_fill(const AddNoise& args, Type type, Noise noise, cudaStream_t stream);

// args.states are not written and may be null; out may be x.
cudaError_t launch_add_transformed(const Fused& args, Type type, Transform transform, cudaStream_t stream);

// args.x null: the state alone, `type` is not looked at. args.squares: sums of squares of the tiles, for launch_tile_sum.
cudaError_t launch_state_fold(const Fused& args, Type type, cudaStream_t stream);
cudaError_t launch_rule_step(const Fused& args, Type type, Rule rule, cudaStream_t stream);

// Bit n of `bits` (little-endian in bytes, unused ones 0): |x[n]| <= thresholds[n / 1024].
cudaError_t launch_mask_below(uint8_t* bits, const void* x, Type type, const float* thresholds, int64_t count,
                              cudaStream_t stream);

// args.block_count rows of args.parts are there if there is a score; how many blocks a launch takes then:
int64_t kron_score_blocks(int64_t blocks, int64_t widest);
// Does all blocks; first_block and capacity are not looked at. args.x null: the score alone, `type` is not looked at.
cudaError_t launch_kron(const Kron& args, Type type, cudaStream_t stream);

cudaError_t launch_lowrank_add(const LowRank& args, Type type, cudaStream_t stream);

// out[0]: the lane sum of `count` tile sums; `lanes`: kTileSumLanes doubles of scratch memory.
cudaError_t launch_tile_sum(const double* tiles, int64_t count, double* lanes, double* out, cudaStream_t stream);

constexpr int64_t kTileSumLanes = 256;

cudaError_t launch_segment_fill(const SegmentFill& args, Type type, cudaStream_t stream);

// args.counts is zeroed first.
cudaError_t launch_segment_histogram(const Histogram& args, Type type, cudaStream_t stream);

// Doubles of scratch memory that the functions below need.
int64_t stats_workspace(int64_t segments);
int64_t dot_workspace(int64_t segments);

// out: (segments, 4) sum, sum of squares, minimum, maximum.
cudaError_t launch_segment_stats(const Segments& args, Type type, double* workspace, double* out,
                                 cudaStream_t stream);

// out: (segments,).
cudaError_t launch_segment_dot(const Segments& args, Type type, const Factor& factor, double* workspace,
                               double* out, cudaStream_t stream);

}  // namespace zo::cuda
