// What `bipartite_match` and `peaks_match` take from `nearest_token`.
#pragma once

#include <functional>
#include <tuple>

#include "../ops/nearest_token_params.h"
#include "../stable.h"

namespace tokenprune {

// The similarities of one image's patch tokens, sorted by rank: row i begins with those to the places of lower rank.
struct Similarities {
  const void* rows;  // [patches, stride], in the dtype of sums
  int64_t stride;
  const int32_t* tokens;  // [stride]: the token of every place
  const void* largest;    // [tokens]: the result of every token
};

// Called after every image, with its similarities; by several threads at once.
using Follow = std::function<void(int64_t image, const Similarities& similarities)>;

// Similarity and position of the most similar patch token of lower rank. Arguments are checked and contiguous.
std::tuple<Tensor, Tensor> nearest_cpu(const NearestTokenParams& params,
                                       const Tensor& metric,  // [batch, tokens, channels]
                                       const Tensor& rank,    // [batch, tokens]
                                       const Follow* follow = nullptr);

}  // namespace tokenprune
