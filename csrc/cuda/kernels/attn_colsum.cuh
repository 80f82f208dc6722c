// Attention received: sum over query rows of the reduction over heads. A block owns a few columns of one image; its
// warps walk over the rows and the heads inside, so that the reduction over heads stays in registers.
#pragma once

#include "../../ops/attn_colsum_params.h"
#include "common.cuh"

namespace tokenprune {
namespace attn_colsum {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPerLane = 2;
constexpr int kColumns = kPerLane * kWarpSize;

template <typename value_t, typename acc_t, bool kMax>
__global__ void __launch_bounds__(kThreads) kernel(AttnColsumParams params, int tiles,
                                                   const value_t* attn,  // [batch, heads, n, n]
                                                   acc_t* out) {         // [batch, n]
  TOKENPRUNE_SHARED(acc_t, partial, kWarps * kColumns);
  const int64_t n = params.tokens;
  const int64_t image = blockIdx.x / tiles;
  const int64_t tile = static_cast<int64_t>(blockIdx.x % tiles) * kColumns;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  attn += image * params.heads * n * n;

  acc_t sums[kPerLane] = {};
  for (int64_t q = params.row_begin + warp; q < params.row_end; q += kWarps) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int64_t k = tile + j * kWarpSize + lane;
      if (k >= n) continue;
      const value_t* entry = attn + q * n + k;
      acc_t reduced = to_acc<acc_t>(*entry);
      for (int64_t h = 1; h < params.heads; ++h) {
        const acc_t value = to_acc<acc_t>(entry[h * n * n]);
        reduced = kMax ? max_nan(reduced, value) : reduced + value;
      }
      sums[j] += reduced;
    }
  }
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) partial[warp * kColumns + j * kWarpSize + lane] = sums[j];
  __syncthreads();
  for (int c = threadIdx.x; c < kColumns && tile + c < n; c += kThreads) {
    const acc_t scale = params.head_reduce == HeadReduce::kMean ? static_cast<acc_t>(params.heads) : acc_t(1);
    const acc_t total = column_total<kWarps, kColumns>(partial, c) / scale;
    out[image * n + tile + c] = tile + c < params.num_prefix ? acc_t(0) : total;
  }
}

}  // namespace attn_colsum

template <typename value_t, typename acc_t>
cudaError_t launch_attn_colsum(const AttnColsumParams& params, const value_t* attn, acc_t* out, cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  const int64_t tiles = ceil_div<int64_t>(params.tokens, attn_colsum::kColumns);
  auto* kernel = params.head_reduce == HeadReduce::kMax ? attn_colsum::kernel<value_t, acc_t, true>
                                                        : attn_colsum::kernel<value_t, acc_t, false>;
  return launch(kernel, static_cast<unsigned>(params.batch * tiles), attn_colsum::kThreads, 0, stream, params,
                static_cast<int>(tiles), attn, out);
}

}  // namespace tokenprune
