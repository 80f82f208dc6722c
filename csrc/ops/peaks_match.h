// Argument checks of `peaks_match`, for both backends.
#pragma once

#include <cmath>

#include "nearest_token.h"
#include "peaks_match_params.h"

namespace tokenprune {

inline PeaksMatchParams check_peaks_match(Tensor& metric,            // [B, N, D]
                                          const Tensor& importance,  // [B, N]
                                          int64_t keep, int64_t num_prefix, double exponent) {
  const PeaksMatchParams params{check_metric(metric, num_prefix, "cosine"), keep, exponent};
  STD_TORCH_CHECK(importance.dim() == 2 && importance.size(0) == params.nearest.batch &&
                      importance.size(1) == params.nearest.tokens,
                  "importance must have shape [B, N] to go with metric");
  STD_TORCH_CHECK(importance.scalar_type() == accumulate_dtype(metric),
                  "importance must be float32, or float64 for a metric of float64");
  STD_TORCH_CHECK(importance.device() == metric.device(), "importance must be on the device of metric");
  STD_TORCH_CHECK(1 <= keep && keep <= params.nearest.patches(), "keep must be in 1..", params.nearest.patches(),
                  ", got ", keep);
  STD_TORCH_CHECK(std::isfinite(exponent) && exponent > 0, "exponent must be positive and finite, got ", exponent);
  return params;
}

}  // namespace tokenprune
