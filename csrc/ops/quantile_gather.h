// Argument checks of `quantile_gather`, for both backends: it takes what `topk_gather` takes.
#pragma once

#include "quantile_gather_params.h"
#include "topk_gather.h"

namespace tokenprune {

inline TopkGatherParams check_quantile_gather(const Tensor& x,       // [B, N, C]
                                              const Tensor& scores,  // [B, N]
                                              int64_t keep, int64_t num_prefix) {
  return check_topk_gather(x, scores, keep, num_prefix, "none");
}

}  // namespace tokenprune
