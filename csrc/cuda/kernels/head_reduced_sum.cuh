// Sum over channels of the reduction over heads. Some lanes of a warp share a token: each reduces 16 bytes of channels
// over the heads in registers and adds them up.
#pragma once

#include <algorithm>
#include <bit>

#include "../../ops/head_reduced_sum_params.h"
#include "common.cuh"

namespace tokenprune {
namespace head_reduced_sum {

constexpr int kThreads = 256;

// `lanes`, a power of two up to 32, have a token. Which lane adds what does not depend on kVectors.
template <typename value_t, typename acc_t, bool kMax, bool kVectors>
__global__ void __launch_bounds__(kThreads) kernel(HeadReducedSumParams params, int lanes,
                                                   const value_t* features,  // [batch, heads, tokens, channels]
                                                   acc_t* out) {             // [batch, tokens]
  constexpr int kCount = 16 / static_cast<int>(sizeof(value_t));
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  const int lane = threadIdx.x % lanes;
  const bool valid = row < params.batch * params.tokens;
  features += row / params.tokens * params.batch_stride + row % params.tokens * params.token_stride;

  acc_t sum = 0;
  for (int64_t first = lane * kCount; valid && first < params.channels; first += lanes * kCount) {
    const auto load = [&](int64_t head) {
      const value_t* from = features + head * params.head_stride + first;
      if constexpr (kVectors) {
        return *reinterpret_cast<const Pack<value_t, kCount>*>(from);
      } else {
        Pack<value_t, kCount> pack = {};
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          if (first + c < params.channels) pack.values[c] = from[c];
        }
        return pack;
      }
    };
    acc_t reduced[kCount];
    const Pack<value_t, kCount> own = load(0);
#pragma unroll
    for (int c = 0; c < kCount; ++c) reduced[c] = to_acc<acc_t>(own.values[c]);
#pragma unroll 4
    for (int64_t h = 1; h < params.heads; ++h) {
      const Pack<value_t, kCount> more = load(h);
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        const acc_t value = to_acc<acc_t>(more.values[c]);
        reduced[c] = kMax ? max_nan(reduced[c], value) : reduced[c] + value;
      }
    }
#pragma unroll
    for (int c = 0; c < kCount; ++c) sum += reduced[c];  // zeros beyond the last channel
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (valid && lane == 0) out[row] = sum / static_cast<acc_t>(params.divisor());
}

}  // namespace head_reduced_sum

template <typename value_t, typename acc_t>
cudaError_t launch_head_reduced_sum(const HeadReducedSumParams& params, const value_t* features, acc_t* out,
                                    cudaStream_t stream) {
  using head_reduced_sum::kernel;
  if (params.batch == 0) return cudaSuccess;
  constexpr int64_t kCount = 16 / static_cast<int64_t>(sizeof(value_t));
  const int64_t packs = ceil_div<int64_t>(params.channels, kCount);
  const int lanes = static_cast<int>(std::min<uint64_t>(kWarpSize, std::bit_ceil(static_cast<uint64_t>(packs))));
  const bool vectors =
      can_copy_vectors(features, {params.channels, params.batch_stride, params.head_stride, params.token_stride});
  const bool max = params.head_reduce == HeadReduce::kMax;
  auto* chosen = max ? (vectors ? kernel<value_t, acc_t, true, true> : kernel<value_t, acc_t, true, false>)
                     : (vectors ? kernel<value_t, acc_t, false, true> : kernel<value_t, acc_t, false, false>);
  const int64_t threads = params.batch * params.tokens * lanes;
  return launch(chosen, static_cast<unsigned>(ceil_div<int64_t>(threads, head_reduced_sum::kThreads)),
                head_reduced_sum::kThreads, 0, stream, params, lanes, features, out);
}

}  // namespace tokenprune
