// How the kernels are started. No torch here: everything that knows torch stands in ops.cpp.
//
// Each function enqueues its kernels on `stream` of the current device, neither allocates nor synchronises, and returns
// the launch error.
#pragma once

#include <cuda_runtime_api.h>

#include "arguments.h"

namespace zo::cuda {

cudaError_t launch_add_noise(const AddNoise& args, Type type, Noise noise, cudaStream_t stream);

// args.x, coeffs, states, keep and rounding_seed are not read; args.terms is 1.
cudaError_t launch_noise_fill(const AddNoise& args, Type type, Noise noise, cudaStream_t stream);

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
