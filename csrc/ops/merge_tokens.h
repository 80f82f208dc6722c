// Argument checks of `merge_tokens`, for both backends. What the positions are is another matter: see the kernels.
#pragma once

#include <optional>

#include "../stable.h"
#include "merge_tokens_params.h"

namespace tokenprune {

inline MergeTokensParams check_merge_tokens(const Tensor& x,                    // [B, N, C]
                                            const std::optional<Tensor>& size,  // [B, N]
                                            const Tensor& kept,                 // [B, K]
                                            const Tensor& dropped,              // [B, R]
                                            const Tensor& match,                // [B, R]
                                            int64_t num_prefix) {
  STD_TORCH_CHECK(x.dim() == 3, "x must have shape [B, N, C]");
  const auto check_positions = [&](const char* name, const Tensor& positions) {
    STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Long, name, " must be int64");
    STD_TORCH_CHECK(positions.dim() == 2 && positions.size(0) == x.size(0), name,
                    " must have two dimensions and the batch size of x");
    STD_TORCH_CHECK(positions.device() == x.device(), name, " must be on the device of x");
  };
  check_positions("kept", kept);
  check_positions("dropped", dropped);
  check_positions("match", match);
  STD_TORCH_CHECK(match.size(1) == dropped.size(1), "match must have the shape of dropped");
  if (size.has_value()) {
    STD_TORCH_CHECK(size->dim() == 2 && size->size(0) == x.size(0) && size->size(1) == x.size(1),
                    "size must have shape [B, N] to go with x");
    STD_TORCH_CHECK(size->scalar_type() == accumulate_dtype(x), "size must be float32, float64 for float64 x");
    STD_TORCH_CHECK(size->device() == x.device(), "size must be on the device of x");
  }
  STD_TORCH_CHECK(0 <= num_prefix && num_prefix <= x.size(1), "num_prefix must be in 0..", x.size(1), ", got ",
                  num_prefix);
  STD_TORCH_CHECK(kept.size(1) <= x.size(1) - num_prefix, "kept must name at most ", x.size(1) - num_prefix,
                  " tokens an image, got ", kept.size(1));
  STD_TORCH_CHECK(num_prefix + kept.size(1) >= 1, "at least one token must be left");
  return {x.size(0), x.size(1), x.size(2), num_prefix, kept.size(1), dropped.size(1)};
}

}  // namespace tokenprune
