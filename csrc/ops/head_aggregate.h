// Argument checks of `head_aggregate`, for both backends.
#pragma once

#include "../stable.h"
#include "head_aggregate_params.h"

namespace tokenprune {

inline HeadAggregateParams check_head_aggregate(const Tensor& scores,  // [B, H, N]
                                                double vmin, double vmax, int64_t num_prefix) {
  STD_TORCH_CHECK(scores.dim() == 3, "scores must have shape [B, H, N]");
  STD_TORCH_CHECK(scores.size(1) > 0 && scores.size(2) > 0, "scores must have at least one head and one token");
  STD_TORCH_CHECK(vmin <= vmax, "vmin must not be above vmax, got vmin=", vmin, " and vmax=", vmax);
  STD_TORCH_CHECK(0 <= num_prefix && num_prefix < scores.size(2), "num_prefix must be in 0..", scores.size(2) - 1,
                  ", got ", num_prefix);
  return {scores.size(0), scores.size(1), scores.size(2), num_prefix, vmin, vmax};
}

}  // namespace tokenprune
