// Argument checks of `nearest_token`, for both backends.
#pragma once

#include <string>

#include "../stable.h"
#include "nearest_token_params.h"
#include "similarity.h"

namespace tokenprune {

// The part that does not concern the ranks. Copies `metric` when the channels of a token do not lie side by side.
inline NearestTokenParams check_metric(Tensor& metric,  // [B, N, D], or with `heads` also [B, H, N, D]
                                       int64_t num_prefix, const std::string& similarity, bool heads = false) {
  const int64_t dim = metric.dim();
  STD_TORCH_CHECK(dim == 3 || (heads && dim == 4), "metric must have shape [B, N, D]", heads ? " or [B, H, N, D]" : "");
  const int64_t tokens = metric.size(dim - 2);
  const int64_t channels = metric.size(dim - 1);
  STD_TORCH_CHECK(tokens > 0 && channels > 0, "metric must have at least one token and one channel");
  STD_TORCH_CHECK(metric.size(1) > 0, "metric must have at least one head");
  STD_TORCH_CHECK(0 <= num_prefix && num_prefix <= tokens, "num_prefix must be in 0..", tokens, ", got ", num_prefix);
  const Similarity chosen = similarity_of(similarity);
  if (metric.stride(dim - 1) != 1) metric = torch::stable::contiguous(metric);
  const int64_t num_heads = dim == 4 ? metric.size(1) : 1;
  const int64_t head_stride = dim == 4 ? metric.stride(1) : 0;
  return {metric.size(0),         num_heads,  tokens, channels, metric.stride(0), head_stride,
          metric.stride(dim - 2), num_prefix, chosen};
}

inline NearestTokenParams check_nearest_token(Tensor& metric,      // [B, N, D]
                                              const Tensor& rank,  // [B, N]
                                              int64_t num_prefix, const std::string& similarity) {
  const NearestTokenParams params = check_metric(metric, num_prefix, similarity);
  STD_TORCH_CHECK(rank.dim() == 2 && rank.size(0) == params.batch && rank.size(1) == params.tokens,
                  "rank must have shape [B, N] to go with metric");
  STD_TORCH_CHECK(rank.scalar_type() == ScalarType::Long, "rank must have dtype int64");
  STD_TORCH_CHECK(rank.device() == metric.device(), "rank must be on the device of metric");
  return params;
}

}  // namespace tokenprune
