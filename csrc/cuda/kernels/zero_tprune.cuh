// What lies between the operators that Zero-TPrune's stages are.
#pragma once

#include <limits>

#include "../../ops/zero_tprune_params.h"
#include "common.cuh"

namespace tokenprune {
namespace zero_tprune {

constexpr int kThreads = 256;

template <typename acc_t>
__global__ void __launch_bounds__(kThreads) start_kernel(acc_t class_token, int64_t n, acc_t* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) out[i] = i == 0 ? class_token : acc_t(1);
}

// One block an image: minus infinity everywhere, then the scores that there are.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) spread_kernel(ZeroTPruneParams params,
                                                          const acc_t* left,    // [batch, left]
                                                          const int64_t* kept,  // [batch, kept patch tokens]
                                                          acc_t* out) {         // [batch, tokens]
  const int64_t n = params.qk.tokens;
  const int64_t prefix = params.num_prefix();
  left += blockIdx.x * params.left();
  kept += blockIdx.x * params.match.kept();
  out += blockIdx.x * n;
  for (int64_t i = threadIdx.x; i < n; i += kThreads)
    out[i] = i < prefix ? left[i] : -std::numeric_limits<acc_t>::infinity();
  __syncthreads();
  for (int64_t i = threadIdx.x; i < params.match.kept(); i += kThreads) out[kept[i]] = left[prefix + i];
}

}  // namespace zero_tprune

// The scores that page rank of n tokens begins with.
template <typename acc_t>
cudaError_t launch_start(acc_t class_token, int64_t n, acc_t* out, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((n + zero_tprune::kThreads - 1) / zero_tprune::kThreads);
  return launch(zero_tprune::start_kernel<acc_t>, blocks, zero_tprune::kThreads, 0, stream, class_token, n, out);
}

template <typename acc_t>
cudaError_t launch_spread(const ZeroTPruneParams& params, const acc_t* left, const int64_t* kept, acc_t* out,
                          cudaStream_t stream) {
  if (params.qk.batch == 0) return cudaSuccess;
  return launch(zero_tprune::spread_kernel<acc_t>, static_cast<unsigned>(params.qk.batch), zero_tprune::kThreads, 0,
                stream, params, left, kept, out);
}

}  // namespace tokenprune
