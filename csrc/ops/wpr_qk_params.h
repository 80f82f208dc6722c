#pragma once

#include "qk_params.h"
#include "wpr_params.h"

namespace tokenprune {

// The iteration `wpr` over A = softmax(scale * q k^T) of `qk`. Where only some tokens are ranked, `tokens` of both is
// how many: token i of them is the i-th of all `source_tokens` for i < num_prefix, then the one that `among` names.
struct WprQkParams {
  QkParams qk;
  WprParams wpr;
  int64_t num_prefix;
  int64_t source_tokens;

  constexpr int64_t named() const { return qk.tokens - num_prefix; }  // by `among`, in an image
};

}  // namespace tokenprune
