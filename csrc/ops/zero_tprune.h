// Argument checks of `zero_tprune`, for both backends, and its stages as calls of other operators.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "bipartite_match.h"
#include "qk.h"
#include "zero_tprune_params.h"

namespace tokenprune {

using ZeroTPruneResults = std::tuple<Tensor, Tensor, Tensor>;  // scores, dropped, match

inline ZeroTPruneParams check_zero_tprune(Tensor& q, Tensor& k,  // [B, H, N, d]
                                          Tensor& metric,        // [B, N, D] or [B, H, N, D]
                                          double scale, int64_t r, bool class_start, int64_t max_iters, double tol,
                                          double vmin, double vmax, int64_t num_prefix, const std::string& partition,
                                          const std::string& similarity) {
  const QkParams qk = check_qk(q, k, scale);
  const BipartiteMatchParams match = check_pairs(metric, r, num_prefix, partition, similarity);
  STD_TORCH_CHECK(match.partition != Partition::kAlternate, "partition must be one of unimportant, important");
  STD_TORCH_CHECK(match.nearest.batch == qk.batch && match.nearest.tokens == qk.tokens,
                  "metric must have the batch and the tokens of q");
  STD_TORCH_CHECK(metric.device() == q.device(), "metric must be on the device of q");
  STD_TORCH_CHECK(num_prefix < qk.tokens, "num_prefix must be in 0..", qk.tokens - 1, ", got ", num_prefix);
  STD_TORCH_CHECK(!class_start || num_prefix > 0, "class_start needs a class token: num_prefix must be at least 1");
  STD_TORCH_CHECK(max_iters >= 0, "max_iters must be at least 0, got ", max_iters);
  STD_TORCH_CHECK(tol >= 0, "tol must be at least 0, got ", tol);
  STD_TORCH_CHECK(vmin <= vmax, "vmin must not be above vmax, got vmin=", vmin, " and vmax=", vmax);
  return {qk, match, class_start, max_iters, tol, vmin, vmax};
}

// The stages, each an operator of its own; the matrix is formed twice. Arguments are checked. A backend has those
// operators and
//   start(params, q, tokens)     the scores that page rank of so many tokens begins with; none for ones
//   spread(params, left, kept)   the scores of the tokens that are left, [B, P], where those are among all, [B, N], and
//                                minus infinity for the dropped ones
template <typename Backend>
ZeroTPruneResults run_stages(const ZeroTPruneParams& params, const Tensor& q, const Tensor& k, const Tensor& metric,
                             const std::string& partition, const std::string& similarity, bool allow_tf32) {
  const int64_t prefix = params.num_prefix();
  const auto rank = [&](int64_t tokens, int64_t iters, std::optional<Tensor> among, int64_t in_front) {
    const Tensor ranks = Backend::wpr_qk(q, k, params.qk.scale, Backend::start(params, q, tokens), iters, params.tol,
                                         std::move(among), in_front, allow_tf32);
    return Backend::head_aggregate(ranks, params.vmin, params.vmax, prefix);
  };
  const Tensor rough = rank(params.qk.tokens, 1, {}, 0);
  // A distance is a small difference of products, in which their rounding would drown it.
  const bool tf32_pairs = allow_tf32 && params.match.nearest.similarity != Similarity::kEuclidean;
  const auto [dropped, match, kept] =
      Backend::bipartite_match(metric, rough, params.match.pairs, prefix, partition, similarity, tf32_pairs);
  return {Backend::spread(params, rank(params.left(), params.max_iters, kept, prefix), kept), dropped, match};
}

}  // namespace tokenprune
