// Argument checks of `wpr_qk`, for both backends. What the positions are is another matter: see the kernels.
#pragma once

#include <optional>

#include "qk.h"
#include "wpr.h"
#include "wpr_qk_params.h"

namespace tokenprune {

// Copies what is not laid out as the kernels need it.
inline WprQkParams check_wpr_qk(Tensor& q, Tensor& k, double scale, std::optional<Tensor>& start,  // [P] or [B, H, P]
                                int64_t max_iters, double tol,
                                std::optional<Tensor>& among,  // [B, K]; then P = num_prefix + K, else N
                                int64_t num_prefix) {
  QkParams qk = check_qk(q, k, scale);
  const int64_t all = qk.tokens;
  if (among.has_value()) {
    STD_TORCH_CHECK(among->scalar_type() == ScalarType::Long, "among must be int64");
    STD_TORCH_CHECK(among->dim() == 2 && among->size(0) == qk.batch,
                    "among must have two dimensions and the batch size of q");
    STD_TORCH_CHECK(among->device() == q.device(), "among must be on the device of q");
    STD_TORCH_CHECK(0 <= num_prefix && num_prefix <= all, "num_prefix must be in 0..", all, ", got ", num_prefix);
    STD_TORCH_CHECK(among->size(1) <= all - num_prefix, "among must name at most ", all - num_prefix,
                    " tokens an image, got ", among->size(1));
    qk.tokens = num_prefix + among->size(1);
    STD_TORCH_CHECK(qk.tokens >= 1, "at least one token must be ranked");
    among = as_contiguous(*among);
  } else {
    STD_TORCH_CHECK(num_prefix == 0, "num_prefix must be 0 without among, got ", num_prefix);
  }
  const WprParams wpr = check_iteration(q, qk.tokens, start, max_iters, tol);
  if (start.has_value()) start = as_contiguous(*start);
  return {qk, wpr, num_prefix, all};
}

}  // namespace tokenprune
