// Argument checks of `wpr`, for both backends.
#pragma once

#include "../stable.h"
#include "wpr_params.h"

namespace tokenprune {

inline WprParams check_iteration(const Tensor& of,                    // [B, H, N, ...]
                                 int64_t tokens,                      // that are ranked: N, or some of them
                                 const std::optional<Tensor>& start,  // [tokens] or [B, H, tokens]
                                 int64_t max_iters, double tol) {
  const int64_t batch = of.size(0), heads = of.size(1);
  STD_TORCH_CHECK(max_iters >= 0, "max_iters must be at least 0, got ", max_iters);
  STD_TORCH_CHECK(tol >= 0, "tol must be at least 0, got ", tol);
  int64_t start_stride = 0;
  if (start.has_value()) {
    const bool shared = start->dim() == 1 && start->size(0) == tokens;
    const bool each =
        start->dim() == 3 && start->size(0) == batch && start->size(1) == heads && start->size(2) == tokens;
    STD_TORCH_CHECK(shared || each, "start must have shape [N] or [B, H, N] to go with the matrices");
    STD_TORCH_CHECK(start->scalar_type() == accumulate_dtype(of),
                    "start must be float32, float64 for float64 matrices");
    STD_TORCH_CHECK(start->device() == of.device(), "start must be on the device of the matrices");
    start_stride = shared ? 0 : tokens;
  }
  return {batch * heads, tokens, max_iters, tol * static_cast<double>(tokens), start_stride};
}

inline WprParams check_wpr(const Tensor& attn,                  // [B, H, N, N]
                           const std::optional<Tensor>& start,  // [N] or [B, H, N]
                           int64_t max_iters, double tol) {
  STD_TORCH_CHECK(attn.dim() == 4 && attn.size(2) == attn.size(3), "attn must have shape [B, H, N, N]");
  STD_TORCH_CHECK(attn.size(1) > 0 && attn.size(2) > 0, "attn must have at least one head and one token");
  return check_iteration(attn, attn.size(2), start, max_iters, tol);
}

}  // namespace tokenprune
