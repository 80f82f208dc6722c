// Argument checks of `nearest_token`, for both backends.
#pragma once

#include <string>

#include "../stable.h"
#include "nearest_token_params.h"
#include "similarity.h"

namespace tokenprune {

// The part that does not concern the ranks.
inline NearestTokenParams check_metric(const Tensor& metric,  // [B, N, D]
                                       int64_t num_prefix, const std::string& similarity) {
  STD_TORCH_CHECK(metric.dim() == 3, "metric must have shape [B, N, D]");
  const int64_t tokens = metric.size(1);
  STD_TORCH_CHECK(tokens > 0 && metric.size(2) > 0, "metric must have at least one token and one channel");
  STD_TORCH_CHECK(0 <= num_prefix && num_prefix <= tokens, "num_prefix must be in 0..", tokens, ", got ", num_prefix);
  return {metric.size(0), tokens, metric.size(2), num_prefix, similarity_of(similarity)};
}

inline NearestTokenParams check_nearest_token(const Tensor& metric,  // [B, N, D]
                                              const Tensor& rank,    // [B, N]
                                              int64_t num_prefix, const std::string& similarity) {
  const NearestTokenParams params = check_metric(metric, num_prefix, similarity);
  STD_TORCH_CHECK(rank.dim() == 2 && rank.size(0) == params.batch && rank.size(1) == params.tokens,
                  "rank must have shape [B, N] to go with metric");
  STD_TORCH_CHECK(rank.scalar_type() == ScalarType::Long, "rank must have dtype int64");
  STD_TORCH_CHECK(rank.device() == metric.device(), "rank must be on the device of metric");
  return params;
}

}  // namespace tokenprune
