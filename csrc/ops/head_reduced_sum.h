// Argument checks of `head_reduced_sum`, for both backends.
#pragma once

#include <string>

#include "head_reduce.h"
#include "head_reduced_sum_params.h"

namespace tokenprune {

// Copies `features` when the channels of a token do not lie side by side.
inline HeadReducedSumParams check_head_reduced_sum(Tensor& features,  // [B, H, N, d]
                                                   const std::string& head_reduce) {
  STD_TORCH_CHECK(features.dim() == 4, "features must have shape [B, H, N, d]");
  STD_TORCH_CHECK(features.size(1) > 0 && features.size(2) > 0 && features.size(3) > 0,
                  "features must have at least one head, one token and one channel");
  if (features.stride(3) != 1) features = torch::stable::contiguous(features);
  return {features.size(0),   features.size(1),   features.size(2),   features.size(3),
          features.stride(0), features.stride(1), features.stride(2), head_reduce_of(head_reduce)};
}

}  // namespace tokenprune
