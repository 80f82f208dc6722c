// The class token's row of attention, times the lengths of the values, head by head. A block owns one head of an image:
// some lanes of a warp share a token, as in head_reduced_sum.cuh, which then reduces over the heads.
#pragma once

#include <algorithm>
#include <bit>
#include <limits>

#include "../../ops/class_attention_params.h"
#include "head_reduced_sum.cuh"

namespace tokenprune {

template <typename value_t>
struct ClassAttentionInputs {
  const value_t* q;
  const value_t* k;
  const value_t* v;     // or null
  const value_t* bias;  // or null
  bool vectors;         // rows can be read 16 bytes at a time
};

namespace class_attention {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }

// The dot product of two rows of `channels` numbers, formed by `lanes` lanes side by side; every one gets it.
template <typename acc_t, typename value_t>
__device__ acc_t dot(const value_t* a, const value_t* b, int64_t channels, bool vectors, int lanes) {
  constexpr int kCount = 16 / static_cast<int>(sizeof(value_t));
  acc_t sum = 0;
  for (int64_t first = threadIdx.x % lanes * kCount; first < channels; first += lanes * kCount) {
    Pack<value_t, kCount> left = {}, right = {};
    if (vectors) {
      left = *reinterpret_cast<const Pack<value_t, kCount>*>(a + first);
      right = *reinterpret_cast<const Pack<value_t, kCount>*>(b + first);
    } else {
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        if (first + c < channels) {
          left.values[c] = a[first + c];
          right.values[c] = b[first + c];
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kCount; ++c) sum += to_acc<acc_t>(left.values[c]) * to_acc<acc_t>(right.values[c]);
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

// The largest value of the block, or NaN; every thread gets it. `scratch` holds one value a warp.
template <typename acc_t>
__device__ acc_t block_max(acc_t value, acc_t* scratch) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = max_nan(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = scratch[0];
  for (int w = 1; w < kWarps; ++w) value = max_nan(value, scratch[w]);
  __syncthreads();  // scratch may be written again
  return value;
}

template <typename value_t, typename acc_t>
__global__ void __launch_bounds__(kThreads)
    kernel(ClassAttentionParams params, int lanes, ClassAttentionInputs<value_t> in,
           acc_t* weights) {  // [batch, heads, tokens]
  TOKENPRUNE_SHARED(acc_t, scratch, kWarps);
  const QkParams& qk = params.qk;
  const int64_t n = qk.tokens;
  const int64_t image = blockIdx.x / qk.heads;
  const int64_t head = blockIdx.x % qk.heads;
  weights += static_cast<int64_t>(blockIdx.x) * n;
  // All lanes of a warp take every turn: the last tokens are done twice rather than not by all.
  const auto each_token = [&](const auto& visit) {
    for (int64_t base = 0; base < n; base += kThreads / lanes) {
      const int64_t token = base + threadIdx.x / lanes;
      visit(token < n ? token : n - 1, token < n && threadIdx.x % lanes == 0);
    }
  };
  const value_t* query = in.q + qk.q_offset(image, head);
  const value_t* keys = in.k + qk.k_offset(image, head);
  each_token([&](int64_t token, bool writes) {
    const acc_t product = dot<acc_t>(query, keys + token * qk.k_token_stride, qk.channels, in.vectors, lanes);
    acc_t logit = product * static_cast<acc_t>(qk.scale);
    if (in.bias) logit += to_acc<acc_t>(in.bias[params.bias_offset(image, head) + token]);
    if (writes) weights[token] = logit;
  });
  __syncthreads();
  acc_t largest = -std::numeric_limits<acc_t>::infinity();
  for (int64_t i = threadIdx.x; i < n; i += kThreads) largest = max_nan(largest, weights[i]);
  largest = block_max(largest, scratch);
  acc_t sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += weights[i] = exponential(weights[i] - largest);
  sum = block_sum<kThreads>(sum, scratch);
  each_token([&](int64_t token, bool writes) {
    acc_t length = 1;
    if (in.v) {
      const value_t* value = in.v + params.v_offset(image, head) + token * params.v_token_stride;
      length = root(dot<acc_t>(value, value, params.v_channels, in.vectors, lanes));
    }
    if (writes) weights[token] = weights[token] / sum * length;
  });
}

}  // namespace class_attention

template <typename value_t, typename acc_t>
cudaError_t launch_class_attention(const ClassAttentionParams& params, ClassAttentionInputs<value_t> in, acc_t* weights,
                                   acc_t* out, cudaStream_t stream) {
  const QkParams& qk = params.qk;
  if (qk.batch == 0) return cudaSuccess;
  constexpr int64_t kCount = 16 / static_cast<int64_t>(sizeof(value_t));
  const int64_t packs = ceil_div<int64_t>(qk.channels, kCount);
  const int lanes = static_cast<int>(std::min<uint64_t>(kWarpSize, std::bit_ceil(static_cast<uint64_t>(packs))));
  in.vectors = can_copy_vectors(in.q, {qk.channels, qk.q_batch_stride, qk.q_head_stride}) &&
               can_copy_vectors(in.k, {qk.k_batch_stride, qk.k_head_stride, qk.k_token_stride}) &&
               (!in.v || can_copy_vectors(in.v, {params.v_channels, params.v_batch_stride, params.v_head_stride,
                                                 params.v_token_stride}));
  const cudaError_t error = launch(class_attention::kernel<value_t, acc_t>, static_cast<unsigned>(qk.batch * qk.heads),
                                   class_attention::kThreads, 0, stream, params, lanes, in, weights);
  if (error != cudaSuccess) return error;
  const HeadReducedSumParams heads{qk.batch,  qk.heads, qk.tokens,         1, qk.heads * qk.tokens,
                                   qk.tokens, 1,        params.head_reduce};
  return launch_head_reduced_sum(heads, static_cast<const acc_t*>(weights), out, stream);
}

}  // namespace tokenprune
