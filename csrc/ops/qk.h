// Argument checks of queries and keys, for both backends.
#pragma once

#include <cmath>

#include "../stable.h"
#include "qk_params.h"

namespace tokenprune {

// Copies `q` and `k` when the channels of a token do not lie side by side.
inline QkParams check_qk(Tensor& q, Tensor& k, double scale) {  // [B, H, N, d]
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must have shape [B, H, N, d]");
  for (int64_t i = 0; i < 4; ++i) STD_TORCH_CHECK(q.size(i) == k.size(i), "k must have the shape of q");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type(), "k must have the dtype of q");
  STD_TORCH_CHECK(q.device() == k.device(), "k must be on the device of q");
  STD_TORCH_CHECK(q.size(1) > 0 && q.size(2) > 0 && q.size(3) > 0,
                  "q must have at least one head, one token and one channel");
  STD_TORCH_CHECK(std::isfinite(scale), "scale must be finite, got ", scale);
  if (q.stride(3) != 1) q = torch::stable::contiguous(q);
  if (k.stride(3) != 1) k = torch::stable::contiguous(k);
  return {q.size(0),   q.size(1),   q.size(2),   q.size(3),   q.stride(0), q.stride(1),
          q.stride(2), k.stride(0), k.stride(1), k.stride(2), scale};
}

}  // namespace tokenprune
