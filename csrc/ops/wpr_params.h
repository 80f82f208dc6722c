#pragma once

#include <cstdint>

namespace tokenprune {

// Weighted page rank: s <- A^T s for each of `matrices` = B * H row-stochastic matrices [tokens, tokens].
struct WprParams {
  int64_t matrices;
  int64_t tokens;
  int64_t max_iters;
  double threshold;      // a matrix stops when sum |s_t - s_(t-1)| is at most this: tol * tokens
  int64_t start_stride;  // between the starts of two matrices: tokens, or 0 when all share one
};

}  // namespace tokenprune
