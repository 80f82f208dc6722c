// Argument checks of `topk_gather`, for both backends.
#pragma once

#include <string>

#include "../stable.h"
#include "topk_gather_params.h"

namespace tokenprune {

inline TopkGatherParams check_topk_gather(const Tensor& x,       // [B, N, C]
                                          const Tensor& scores,  // [B, N]
                                          int64_t keep, int64_t num_prefix, const std::string& fuse) {
  STD_TORCH_CHECK(x.dim() == 3, "x must have shape [B, N, C]");
  STD_TORCH_CHECK(scores.dim() == 2 && scores.size(0) == x.size(0) && scores.size(1) == x.size(1),
                  "scores must have shape [B, N] to go with x");
  STD_TORCH_CHECK(scores.device() == x.device(), "scores must be on the device of x");
  STD_TORCH_CHECK(0 <= num_prefix && num_prefix <= x.size(1), "num_prefix must be in 0..", x.size(1), ", got ",
                  num_prefix);
  STD_TORCH_CHECK(1 <= keep && keep <= x.size(1) - num_prefix, "keep must be in 1..", x.size(1) - num_prefix, ", got ",
                  keep);
  TopkGatherParams params{x.size(0), x.size(1), x.size(2), num_prefix, keep, Fuse::kNone};
  if (fuse == "mean") {
    params.fuse = Fuse::kMean;
  } else if (fuse == "weighted") {
    params.fuse = Fuse::kWeighted;
  } else {
    STD_TORCH_CHECK(fuse == "none", "fuse must be one of none, mean, weighted, got '", fuse, "'");
  }
  return params;
}

}  // namespace tokenprune
