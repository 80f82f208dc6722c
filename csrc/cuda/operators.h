// Operators that `zero_tprune` calls.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "../stable.h"

namespace tokenprune {

Tensor wpr_qk_cuda(Tensor q, Tensor k, double scale, std::optional<Tensor> start, int64_t max_iters, double tol,
                   std::optional<Tensor> among, int64_t num_prefix, bool allow_tf32);
Tensor head_aggregate_cuda(Tensor scores, double vmin, double vmax, int64_t num_prefix);
std::tuple<Tensor, Tensor, Tensor> bipartite_match_cuda(Tensor metric, std::optional<Tensor> scores, int64_t r,
                                                        int64_t num_prefix, std::string partition,
                                                        std::string similarity, bool allow_tf32);

}  // namespace tokenprune
