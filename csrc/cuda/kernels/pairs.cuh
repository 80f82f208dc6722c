// Bipartite matching around the search for the nearest token and two selections: groups, scores of pairs, results.
#pragma once

#include <limits>

#include "../../ops/bipartite_match_params.h"
#include "common.cuh"

namespace tokenprune {
namespace pairs {

constexpr int kThreads = 256;

// The group of every patch token, 0 for B and 1 for A: as ranks they leave A the tokens of B.
static __global__ void __launch_bounds__(kThreads) group_kernel(BipartiteMatchParams params,
                                                                const int64_t* upper,  // [batch, important]
                                                                const int32_t* lower,  // [batch, the others]
                                                                int64_t* group) {      // [batch, tokens]
  const int64_t n = params.nearest.patches();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.nearest.batch * n) return;
  const int64_t image = i / n;
  const int64_t place = i % n;
  group += image * params.nearest.tokens;
  if (params.partition == Partition::kAlternate) {
    group[params.nearest.num_prefix + place] = 1 - place % 2;
  } else if (place < params.important()) {
    group[upper[image * params.important() + place]] = params.important_group();
  } else {
    group[lower[image * (n - params.important()) + place - params.important()]] = 1 - params.important_group();
  }
}

// What the pairs are selected by, highest first: minus infinity for a token of A without a partner, and NaN, which
// comes after it, for the tokens of B.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) score_kernel(BipartiteMatchParams params,
                                                         const int64_t* group,     // [batch, tokens]
                                                         const int64_t* partner,   // [batch, tokens]
                                                         const acc_t* similarity,  // [batch, tokens]
                                                         acc_t* score) {           // [batch, tokens]
  const int64_t n = params.nearest.patches();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.nearest.batch * n) return;
  const int64_t token = i / n * params.nearest.tokens + params.nearest.num_prefix + i % n;
  acc_t value = similarity[token];
  if (partner[token] < 0) value = -std::numeric_limits<acc_t>::infinity();
  if (group[token] == 0) value = std::numeric_limits<acc_t>::quiet_NaN();
  score[token] = value;
}

static __global__ void __launch_bounds__(kThreads) result_kernel(BipartiteMatchParams params,
                                                                 const int64_t* group,    // [batch, tokens]
                                                                 const int64_t* partner,  // [batch, tokens]
                                                                 const int64_t* dropped,  // [batch, pairs]
                                                                 const int32_t* others,   // [batch, kept]
                                                                 int64_t* match,          // [batch, pairs]
                                                                 int64_t* kept) {         // [batch, kept]
  const int64_t n = params.nearest.patches();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.nearest.batch * n) return;
  const int64_t image = i / n;
  const int64_t place = i % n;
  if (place >= params.pairs) {
    const int64_t k = image * params.kept() + place - params.pairs;
    kept[k] = others[k];
    return;
  }
  const int64_t pair = image * params.pairs + place;
  int64_t found = partner[image * params.nearest.tokens + dropped[pair]];
  if (found < 0) {  // rare: the first of group B
    found = params.nearest.num_prefix;
    while (group[image * params.nearest.tokens + found] != 0) ++found;
  }
  match[pair] = found;
}

// A thread for every patch token of the batch.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_patches(void (*kernel)(BipartiteMatchParams, Parameters...), const BipartiteMatchParams& params,
                           cudaStream_t stream, Arguments... arguments) {
  const int64_t patches = params.nearest.batch * params.nearest.patches();
  if (patches == 0) return cudaSuccess;
  return launch(kernel, static_cast<unsigned>(ceil_div<int64_t>(patches, kThreads)), kThreads, 0, stream, params,
                arguments...);
}

}  // namespace pairs

inline cudaError_t launch_groups(const BipartiteMatchParams& params, const int64_t* upper, const int32_t* lower,
                                 int64_t* group, cudaStream_t stream) {
  return pairs::launch_patches(pairs::group_kernel, params, stream, upper, lower, group);
}

template <typename acc_t>
cudaError_t launch_pair_scores(const BipartiteMatchParams& params, const int64_t* group, const int64_t* partner,
                               const acc_t* similarity, acc_t* score, cudaStream_t stream) {
  return pairs::launch_patches(pairs::score_kernel<acc_t>, params, stream, group, partner, similarity, score);
}

inline cudaError_t launch_pairs(const BipartiteMatchParams& params, const int64_t* group, const int64_t* partner,
                                const int64_t* dropped, const int32_t* others, int64_t* match, int64_t* kept,
                                cudaStream_t stream) {
  return pairs::launch_patches(pairs::result_kernel, params, stream, group, partner, dropped, others, match, kept);
}

}  // namespace tokenprune
