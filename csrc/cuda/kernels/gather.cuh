// Selection, copies and the fused token in one launch. Several blocks share an image when there are few images: each
// selects for itself, which costs less than waiting for another, and then moves its part of the tokens.
#pragma once

#include <algorithm>

#include "select.cuh"

namespace tokenprune {
namespace gather {

constexpr int kThreads = select::kThreads;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPerLane = 2;
constexpr int kChannels = kPerLane * kWarpSize;  // channels of the fused token a block sums at a time
constexpr int kMaxParts = 16;                    // blocks of an image

// Copies the prefix and the kept tokens, a warp a token. `unit_t` is what a lane moves at a time.
template <typename unit_t>
__device__ void copy_tokens(const TopkGatherParams& params, int64_t units,
                            const unit_t* x,       // [tokens, units]
                            const int32_t* order,  // [patches]: the kept ones first
                            unit_t* out) {         // [tokens_out, units]
  const int64_t rows = params.num_prefix + params.keep;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kWarps;
  for (int64_t row = blockIdx.y * kWarps + threadIdx.x / kWarpSize; row < rows; row += step) {
    const int64_t token = row < params.num_prefix ? row : order[row - params.num_prefix];
    for (int64_t i = threadIdx.x % kWarpSize; i < units; i += kWarpSize) out[row * units + i] = x[token * units + i];
  }
}

// The fused token: the sum of the dropped tokens, weighted by their scores, or their mean. Warps share the tokens out,
// and their sums are added in order.
template <typename value_t, typename acc_t, typename score_t>
__device__ void fuse_tokens(const TopkGatherParams& params,
                            const value_t* x,        // [tokens, channels]
                            const score_t* scores,   // [tokens]
                            const int32_t* dropped,  // [dropped]
                            value_t* fused) {        // [channels]
  TOKENPRUNE_SHARED(acc_t, partial, kWarps * kChannels);
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t count = params.dropped();
  const bool weighted = params.fuse == Fuse::kWeighted;
  for (int64_t tile = blockIdx.y * kChannels; tile < params.channels; tile += gridDim.y * kChannels) {
    acc_t sums[kPerLane] = {};
    for (int64_t i = warp; i < count; i += kWarps) {
      const int64_t token = dropped[i];
      const acc_t weight = weighted ? static_cast<acc_t>(scores[token]) : acc_t(1);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int64_t c = tile + j * kWarpSize + lane;
        if (c < params.channels) sums[j] += weight * to_acc<acc_t>(x[token * params.channels + c]);
      }
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) partial[warp * kChannels + j * kWarpSize + lane] = sums[j];
    __syncthreads();
    const acc_t divisor = weighted ? acc_t(1) : static_cast<acc_t>(count);
    for (int c = threadIdx.x; c < kChannels && tile + c < params.channels; c += kThreads) {
      fused[tile + c] = from_acc<value_t>(column_total<kWarps, kChannels>(partial, c) / divisor);
    }
    __syncthreads();  // partial may be written again
  }
}

template <typename unit_t, typename value_t, typename acc_t, typename score_t>
__global__ void __launch_bounds__(kThreads) kernel(TopkGatherParams params,
                                                   const value_t* x,       // [batch, tokens, channels]
                                                   const score_t* scores,  // [batch, tokens]
                                                   value_t* out,           // [batch, tokens_out, channels]
                                                   int64_t* index) {       // [batch, keep]
  int32_t* order = reinterpret_cast<int32_t*>(dynamic_shared());           // [patches]: the kept ones first
  const int64_t image = blockIdx.x;
  x += image * params.tokens * params.channels;
  scores += image * params.tokens;
  out += image * params.tokens_out() * params.channels;
  index += image * params.keep;
  select::split(scores + params.num_prefix, params.tokens - params.num_prefix, params.keep,
                [&](int64_t i, int64_t place, bool stays) {
                  order[stays ? place : params.keep + place] = static_cast<int32_t>(i + params.num_prefix);
                  if (stays && blockIdx.y == 0) index[place] = i + params.num_prefix;
                });
  __syncthreads();
  const int64_t units = params.channels * static_cast<int64_t>(sizeof(value_t)) / static_cast<int64_t>(sizeof(unit_t));
  copy_tokens(params, units, reinterpret_cast<const unit_t*>(x), order, reinterpret_cast<unit_t*>(out));
  if (params.has_fused()) {
    fuse_tokens<value_t, acc_t>(params, x, scores, order + params.keep,
                                out + (params.tokens_out() - 1) * params.channels);
  }
}

// Blocks that share an image.
inline cudaError_t count_parts(const TopkGatherParams& params, int64_t* parts) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const int64_t most = std::min<int64_t>(kMaxParts, ceil_div<int64_t>(params.num_prefix + params.keep, kWarps));
  *parts = std::clamp<int64_t>(2 * multiprocessors / params.batch, 1, most);
  return error;
}

}  // namespace gather

// Copies in units of 16 bytes where rows and pointers allow it.
template <typename acc_t, typename value_t, typename score_t>
cudaError_t launch_topk_gather(const TopkGatherParams& params, const value_t* x, const score_t* scores, value_t* out,
                               int64_t* index, cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  int64_t parts = 0;
  const cudaError_t error = gather::count_parts(params, &parts);
  if (error != cudaSuccess) return error;
  const bool aligned = can_copy_vectors(x, {params.channels}) && can_copy_vectors(out, {params.channels});
  auto* kernel =
      aligned ? gather::kernel<uint4, value_t, acc_t, score_t> : gather::kernel<value_t, value_t, acc_t, score_t>;
  const dim3 grid(static_cast<unsigned>(params.batch), static_cast<unsigned>(parts));
  const int64_t order_bytes = (params.tokens - params.num_prefix) * static_cast<int64_t>(sizeof(int32_t));
  return launch(kernel, grid, gather::kThreads, order_bytes, stream, params, x, scores, out, index);
}

}  // namespace tokenprune
