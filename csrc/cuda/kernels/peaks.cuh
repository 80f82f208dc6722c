// Peaks around two searches for the nearest token: ranks by importance, scores and selection, results.
#pragma once

#include "../../ops/peaks_match_params.h"
#include "select.cuh"

namespace tokenprune {
namespace peaks {

constexpr int kThreads = select::kThreads;

__device__ inline float power(float x, float exponent) { return powf(x, exponent); }
__device__ inline double power(double x, double exponent) { return pow(x, exponent); }

// A thread a patch token: how many come before it, the most important first, equal ones by position.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) rank_kernel(NearestTokenParams params, int blocks,
                                                        const acc_t* importance,  // [batch, tokens]
                                                        int64_t* rank) {          // [batch, tokens]
  using key_t = decltype(select::order_key(acc_t{}));
  TOKENPRUNE_SHARED(key_t, keys, kThreads);
  const int64_t image = blockIdx.x / blocks;
  const int64_t n = params.patches();
  const int64_t own = static_cast<int64_t>(blockIdx.x % blocks) * kThreads + threadIdx.x;
  importance += image * params.tokens + params.num_prefix;
  const key_t key = own < n ? select::order_key(importance[own]) : key_t(0);
  int before = 0;
  for (int64_t base = 0; base < n; base += kThreads) {
    if (base + threadIdx.x < n) keys[threadIdx.x] = select::order_key(importance[base + threadIdx.x]);
    __syncthreads();
    const int count = static_cast<int>(n - base < kThreads ? n - base : kThreads);
    for (int j = 0; j < count; ++j) before += keys[j] > key || (keys[j] == key && base + j < own);
    __syncthreads();  // keys may be written again
  }
  if (own < n) rank[image * params.tokens + params.num_prefix + own] = before;
}

// A block an image: scores, who is kept by them, and the groups among which the others search, 0 for kept tokens.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) choose_kernel(PeaksMatchParams params,
                                                          const acc_t* importance,  // [batch, tokens]
                                                          const acc_t* near,        // [batch, tokens]
                                                          acc_t* score,             // [batch, tokens]
                                                          int64_t* kept,            // [batch, keep]
                                                          int64_t* dropped,         // [batch, dropped]
                                                          int64_t* group) {         // [batch, tokens]
  const int64_t tokens = params.nearest.tokens;
  const int64_t prefix = params.nearest.num_prefix;
  const int64_t image = blockIdx.x;
  score += image * tokens;
  group += image * tokens;
  for (int64_t i = threadIdx.x; i < tokens; i += kThreads) {
    acc_t weight = importance[image * tokens + i];
    if (params.exponent != 1) weight = power(weight, static_cast<acc_t>(params.exponent));
    score[i] = i < prefix ? acc_t(0) : weight * (1 - near[image * tokens + i]);
  }
  __syncthreads();
  select::split(score + prefix, params.nearest.patches(), params.keep, [&](int64_t i, int64_t place, bool stays) {
    group[prefix + i] = stays ? 0 : 1;
    (stays ? kept + image * params.keep : dropped + image * params.dropped())[place] = prefix + i;
  });
}

// A thread a token that is not kept: the most similar kept token, or itself.
static __global__ void __launch_bounds__(kThreads) match_kernel(PeaksMatchParams params,
                                                                const int64_t* index,    // [batch, tokens]
                                                                const int64_t* dropped,  // [batch, dropped]
                                                                int64_t* match) {        // [batch, dropped]
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.nearest.batch * params.dropped()) return;
  const int64_t found = index[i / params.dropped() * params.nearest.tokens + dropped[i]];
  match[i] = found < 0 ? dropped[i] : found;
}

}  // namespace peaks

template <typename acc_t>
cudaError_t launch_ranks(const NearestTokenParams& params, const acc_t* importance, int64_t* rank,
                         cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  const int64_t blocks = ceil_div<int64_t>(params.patches(), peaks::kThreads);
  return launch(peaks::rank_kernel<acc_t>, static_cast<unsigned>(params.batch * blocks), peaks::kThreads, 0, stream,
                params, static_cast<int>(blocks), importance, rank);
}

template <typename acc_t>
cudaError_t launch_choose(const PeaksMatchParams& params, const acc_t* importance, const acc_t* near, acc_t* score,
                          int64_t* kept, int64_t* dropped, int64_t* group, cudaStream_t stream) {
  if (params.nearest.batch == 0) return cudaSuccess;
  return launch(peaks::choose_kernel<acc_t>, static_cast<unsigned>(params.nearest.batch), peaks::kThreads, 0, stream,
                params, importance, near, score, kept, dropped, group);
}

inline cudaError_t launch_matches(const PeaksMatchParams& params, const int64_t* index, const int64_t* dropped,
                                  int64_t* match, cudaStream_t stream) {
  const int64_t threads = params.nearest.batch * params.dropped();
  if (threads == 0) return cudaSuccess;
  return launch(peaks::match_kernel, static_cast<unsigned>(ceil_div<int64_t>(threads, peaks::kThreads)),
                peaks::kThreads, 0, stream, params, index, dropped, match);
}

}  // namespace tokenprune
