// Variance-based head filter and root mean square over the heads left: one block an image.
#pragma once

#include "../../ops/head_aggregate_params.h"
#include "common.cuh"

namespace tokenprune {
namespace head_aggregate {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// Population variance of n scores, in two passes; the same value in every thread.
template <typename value_t, typename acc_t>
__device__ acc_t variance(const value_t* scores, int64_t n, acc_t* scratch) {
  acc_t sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += to_acc<acc_t>(scores[i]);
  const acc_t mean = block_sum<kThreads>(sum, scratch) / static_cast<acc_t>(n);
  acc_t squares = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const acc_t off = to_acc<acc_t>(scores[i]) - mean;
    squares += off * off;
  }
  return block_sum<kThreads>(squares, scratch) / static_cast<acc_t>(n);
}

template <typename value_t, typename acc_t>
__global__ void __launch_bounds__(kThreads) kernel(HeadAggregateParams params,
                                                   const value_t* scores,  // [batch, heads, n]
                                                   acc_t* out) {           // [batch, n]
  int* keep = reinterpret_cast<int*>(dynamic_shared());                    // [heads]
  TOKENPRUNE_SHARED(acc_t, scratch, kWarps);
  const int64_t n = params.tokens;
  const int64_t patches = n - params.num_prefix;
  scores += blockIdx.x * params.heads * n + params.num_prefix;
  out += blockIdx.x * n;

  int64_t kept = 0;
  for (int64_t h = 0; h < params.heads; ++h) {
    const acc_t spread = variance(scores + h * n, patches, scratch);
    const bool passes = static_cast<acc_t>(params.vmin) <= spread && spread <= static_cast<acc_t>(params.vmax);
    if (threadIdx.x == 0) keep[h] = passes;
    kept += passes;
  }
  __syncthreads();
  const bool all = kept == 0;
  const acc_t count = static_cast<acc_t>(all ? params.heads : kept);

  for (int64_t i = threadIdx.x; i < params.num_prefix; i += kThreads) out[i] = 0;
  for (int64_t i = threadIdx.x; i < patches; i += kThreads) {
    acc_t sum = 0;
    for (int64_t h = 0; h < params.heads; ++h) {
      const acc_t value = to_acc<acc_t>(scores[h * n + i]);
      if (all || keep[h]) sum += value * value;
    }
    out[params.num_prefix + i] = sqrt(sum / count);
  }
}

}  // namespace head_aggregate

template <typename value_t, typename acc_t>
cudaError_t launch_head_aggregate(const HeadAggregateParams& params, const value_t* scores, acc_t* out,
                                  cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  return launch(head_aggregate::kernel<value_t, acc_t>, static_cast<unsigned>(params.batch), head_aggregate::kThreads,
                params.heads * static_cast<int64_t>(sizeof(int)), stream, params, scores, out);
}

}  // namespace tokenprune
