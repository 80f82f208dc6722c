// What `bipartite_match` takes from `nearest_token`.
#pragma once

#include <tuple>

#include "../ops/nearest_token_params.h"
#include "adapter.h"

namespace tokenprune {

// Similarity and position of the most similar patch token of lower rank. Arguments are checked, `rank` is contiguous.
std::tuple<Tensor, Tensor> nearest_cuda(const NearestTokenParams& params, bool allow_tf32,
                                        const Tensor& metric,  // as `params` describe it
                                        const Tensor& rank,    // [batch, tokens]
                                        cudaStream_t stream);

}  // namespace tokenprune
