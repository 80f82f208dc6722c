// Argument checks of `bipartite_match`, for both backends.
#pragma once

#include <optional>
#include <string>

#include "bipartite_match_params.h"
#include "nearest_token.h"

namespace tokenprune {

// The part that does not concern the scores.
inline BipartiteMatchParams check_pairs(Tensor& metric,  // [B, N, D] or [B, H, N, D]
                                        int64_t r, int64_t num_prefix, const std::string& partition,
                                        const std::string& similarity) {
  BipartiteMatchParams params{check_metric(metric, num_prefix, similarity, true), r, Partition::kAlternate};
  if (partition == "unimportant") {
    params.partition = Partition::kUnimportant;
  } else if (partition == "important") {
    params.partition = Partition::kImportant;
  } else {
    STD_TORCH_CHECK(partition == "alternate", "partition must be one of alternate, unimportant, important, got '",
                    partition, "'");
  }
  STD_TORCH_CHECK(0 <= r && r <= params.largest_pairs(), "r must be in 0..", params.largest_pairs(), ", got ", r);
  return params;
}

inline BipartiteMatchParams check_bipartite_match(Tensor& metric,                       // [B, N, D] or [B, H, N, D]
                                                  const std::optional<Tensor>& scores,  // [B, N]
                                                  int64_t r, int64_t num_prefix, const std::string& partition,
                                                  const std::string& similarity) {
  const BipartiteMatchParams params = check_pairs(metric, r, num_prefix, partition, similarity);
  if (params.partition == Partition::kAlternate) {
    STD_TORCH_CHECK(!scores.has_value(), "scores must be None with partition='alternate'");
  } else {
    STD_TORCH_CHECK(scores.has_value(), "partition='", partition, "' needs scores [B, N]");
    STD_TORCH_CHECK(
        scores->dim() == 2 && scores->size(0) == params.nearest.batch && scores->size(1) == params.nearest.tokens,
        "scores must have shape [B, N] to go with metric");
    STD_TORCH_CHECK(scores->device() == metric.device(), "scores must be on the device of metric");
  }
  return params;
}

}  // namespace tokenprune
