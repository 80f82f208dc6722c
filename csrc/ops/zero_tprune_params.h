#pragma once

#include "bipartite_match_params.h"
#include "head_aggregate_params.h"
#include "wpr_qk_params.h"

namespace tokenprune {

// Page rank of all tokens, pairs of similar ones among them, page rank of the tokens that no pair drops.
struct ZeroTPruneParams {
  QkParams qk;
  BipartiteMatchParams match;
  bool class_start;  // token 0 begins with the root of how many tokens are ranked, not with 1
  int64_t max_iters;
  double tol;
  double vmin, vmax;

  constexpr int64_t num_prefix() const { return match.nearest.num_prefix; }
  constexpr int64_t left() const { return qk.tokens - match.pairs; }  // tokens that are ranked at the end

  // The ranking of `tokens` tokens, the first ones of them prefix tokens.
  constexpr HeadAggregateParams heads(int64_t tokens) const {
    return {qk.batch, qk.heads, tokens, num_prefix(), vmin, vmax};
  }
};

}  // namespace tokenprune
