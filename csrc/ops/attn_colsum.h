// Argument checks of `attn_colsum`, for both backends.
#pragma once

#include <string>

#include "../stable.h"
#include "attn_colsum_params.h"
#include "head_reduce.h"

namespace tokenprune {

inline AttnColsumParams attn_colsum_params(int64_t batch, int64_t heads, int64_t tokens, const std::string& head_reduce,
                                           const std::string& query_rows, int64_t num_prefix) {
  STD_TORCH_CHECK(0 <= num_prefix && num_prefix <= tokens, "num_prefix must be in 0..", tokens, ", got ", num_prefix);
  AttnColsumParams params{batch, heads, tokens, 0, tokens, num_prefix, head_reduce_of(head_reduce)};
  if (query_rows == "patch") {
    params.row_begin = num_prefix;
  } else if (query_rows == "cls") {
    STD_TORCH_CHECK(num_prefix >= 1, "query_rows='cls' needs a class token: num_prefix must be at least 1, got 0");
    params.row_end = 1;
  } else {
    STD_TORCH_CHECK(query_rows == "all", "query_rows must be one of all, patch, cls, got '", query_rows, "'");
  }
  return params;
}

inline AttnColsumParams check_attn_colsum(const Tensor& attn,  // [B, H, N, N]
                                          const std::string& head_reduce, const std::string& query_rows,
                                          int64_t num_prefix) {
  STD_TORCH_CHECK(attn.dim() == 4 && attn.size(2) == attn.size(3), "attn must have shape [B, H, N, N]");
  STD_TORCH_CHECK(attn.size(1) > 0 && attn.size(2) > 0, "attn must have at least one head and one token");
  return attn_colsum_params(attn.size(0), attn.size(1), attn.size(2), head_reduce, query_rows, num_prefix);
}

}  // namespace tokenprune
