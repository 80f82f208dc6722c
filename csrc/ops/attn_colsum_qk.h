// Argument checks of `attn_colsum_qk`, for both backends.
#pragma once

#include <optional>
#include <string>

#include "attn_colsum.h"
#include "attn_colsum_qk_params.h"
#include "qk.h"

namespace tokenprune {

// Copies what is not laid out as the kernels need it.
inline AttnColsumQkParams check_attn_colsum_qk(Tensor& q, Tensor& k, double scale, const std::string& head_reduce,
                                               const std::string& query_rows, int64_t num_prefix,
                                               std::optional<Tensor>& lse) {  // [B, H, N]
  const QkParams qk = check_qk(q, k, scale);
  if (lse.has_value()) {
    STD_TORCH_CHECK(lse->dim() == 3 && lse->size(0) == qk.batch && lse->size(1) == qk.heads &&
                        lse->size(2) == qk.tokens && lse->device() == q.device(),
                    "lse must have shape [B, H, N] to go with q, and be on its device");
    STD_TORCH_CHECK(lse->scalar_type() == accumulate_dtype(q), "lse must be float32, float64 for float64 q");
    lse = torch::stable::contiguous(*lse);
  }
  return {qk, attn_colsum_params(qk.batch, qk.heads, qk.tokens, head_reduce, query_rows, num_prefix)};
}

}  // namespace tokenprune
