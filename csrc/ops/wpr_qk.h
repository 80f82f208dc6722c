// Argument checks of `wpr_qk`, for both backends.
#pragma once

#include <optional>

#include "qk.h"
#include "wpr.h"
#include "wpr_qk_params.h"

namespace tokenprune {

// Copies what is not laid out as the kernels need it.
inline WprQkParams check_wpr_qk(Tensor& q, Tensor& k, double scale, std::optional<Tensor>& start,  // [N] or [B, H, N]
                                int64_t max_iters, double tol) {
  const QkParams qk = check_qk(q, k, scale);
  const WprParams wpr = check_iteration(q, start, max_iters, tol);
  if (start.has_value()) start = as_contiguous(*start);
  return {qk, wpr};
}

}  // namespace tokenprune
