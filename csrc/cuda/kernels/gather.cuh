// Moves tokens: copies the prefix and the kept ones, a warp a token; and forms the fused token.
#pragma once

#include "../../ops/topk_gather_params.h"
#include "common.cuh"

namespace tokenprune {
namespace gather {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPerLane = 2;
constexpr int kChannels = kPerLane * kWarpSize;  // channels of the fused token a block sums

// `unit_t` is what one lane moves at a time; a row is `units` of them.
template <typename unit_t>
__global__ void __launch_bounds__(kThreads) copy_kernel(TopkGatherParams params, int64_t units,
                                                        const unit_t* x,      // [batch, tokens, units]
                                                        const int64_t* kept,  // [batch, keep]
                                                        unit_t* out) {        // [batch, tokens_out, units]
  const int64_t rows = params.num_prefix + params.keep;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (row >= params.batch * rows) return;
  const int64_t image = row / rows;
  const int64_t place = row % rows;
  const int64_t token = place < params.num_prefix ? place : kept[image * params.keep + place - params.num_prefix];
  x += (image * params.tokens + token) * units;
  out += (image * params.tokens_out() + place) * units;
  for (int64_t i = threadIdx.x % kWarpSize; i < units; i += kWarpSize) out[i] = x[i];
}

// The fused token: sum of weight * token over the dropped tokens, divided by `divisor`. Warps share the tokens out, and
// their sums are added in order.
template <typename value_t, typename acc_t>
__global__ void __launch_bounds__(kThreads) fuse_kernel(TopkGatherParams params, int tiles, acc_t divisor,
                                                        const value_t* x,        // [batch, tokens, channels]
                                                        const acc_t* weights,    // [batch, tokens], or null: ones
                                                        const int32_t* dropped,  // [batch, dropped]
                                                        value_t* out) {          // [batch, tokens_out, channels]
  TOKENPRUNE_SHARED(acc_t, partial, kWarps * kChannels);
  const int64_t image = blockIdx.x / tiles;
  const int64_t tile = static_cast<int64_t>(blockIdx.x % tiles) * kChannels;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t count = params.dropped();
  x += image * params.tokens * params.channels;
  dropped += image * count;
  out += ((image + 1) * params.tokens_out() - 1) * params.channels;

  acc_t sums[kPerLane] = {};
  for (int64_t i = warp; i < count; i += kWarps) {
    const int64_t token = dropped[i];
    const acc_t weight = weights ? weights[image * params.tokens + token] : acc_t(1);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int64_t c = tile + j * kWarpSize + lane;
      if (c < params.channels) sums[j] += weight * to_acc<acc_t>(x[token * params.channels + c]);
    }
  }
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) partial[warp * kChannels + j * kWarpSize + lane] = sums[j];
  __syncthreads();
  for (int c = threadIdx.x; c < kChannels && tile + c < params.channels; c += kThreads) {
    out[tile + c] = from_acc<value_t>(column_total<kWarps, kChannels>(partial, c) / divisor);
  }
}

template <typename unit_t>
cudaError_t launch_copy(const TopkGatherParams& params, int64_t row_bytes, const void* x, const int64_t* kept,
                        void* out, cudaStream_t stream) {
  const int64_t rows = params.batch * (params.num_prefix + params.keep);
  return launch(copy_kernel<unit_t>, static_cast<unsigned>(ceil_div<int64_t>(rows, kWarps)), kThreads, 0, stream,
                params, row_bytes / static_cast<int64_t>(sizeof(unit_t)), static_cast<const unit_t*>(x), kept,
                static_cast<unit_t*>(out));
}

}  // namespace gather

// Copies in the widest units that rows and pointers are aligned to.
template <typename value_t>
cudaError_t launch_gather(const TopkGatherParams& params, const value_t* x, const int64_t* kept, value_t* out,
                          cudaStream_t stream) {
  if (params.batch == 0 || params.channels == 0) return cudaSuccess;
  const int64_t row_bytes = params.channels * static_cast<int64_t>(sizeof(value_t));
  const auto aligned = [&](uint64_t bytes) {
    return row_bytes % bytes == 0 && reinterpret_cast<uint64_t>(x) % bytes == 0 &&
           reinterpret_cast<uint64_t>(out) % bytes == 0;
  };
  if (aligned(sizeof(uint4))) return gather::launch_copy<uint4>(params, row_bytes, x, kept, out, stream);
  return gather::launch_copy<value_t>(params, row_bytes, x, kept, out, stream);
}

template <typename value_t, typename acc_t>
cudaError_t launch_fuse(const TopkGatherParams& params, const value_t* x, const acc_t* weights, const int32_t* dropped,
                        value_t* out, cudaStream_t stream) {
  if (params.batch == 0 || params.channels == 0 || !params.has_fused()) return cudaSuccess;
  const int64_t tiles = ceil_div<int64_t>(params.channels, gather::kChannels);
  const acc_t divisor = params.fuse == Fuse::kMean ? static_cast<acc_t>(params.dropped()) : acc_t(1);
  return launch(gather::fuse_kernel<value_t, acc_t>, static_cast<unsigned>(params.batch * tiles), gather::kThreads, 0,
                stream, params, static_cast<int>(tiles), divisor, x, weights, dropped, out);
}

}  // namespace tokenprune
