#pragma once

#include <cstdint>

namespace tokenprune {

// What the backends have in common beside the parameters, which are those of topk_gather. Sums are formed in one order:
// in runs of kRun tokens, then over the runs. Every backend gets the same bits, and adding 0 changes no sum.
namespace quantile {

constexpr int kRun = 16;

// What a score adds to the sums; NaN is not above 0.
constexpr double weight(double score) { return score > 0 ? score : 0.0; }

// Whether the sum of the tokens up to one reaches the quantile (k - 1/2) / keep of all, k = 1..keep. True for `total`.
constexpr bool reaches(double sum, double total, int64_t k, int64_t keep) {
  return static_cast<double>(keep) * sum >= (static_cast<double>(k) - 0.5) * total;
}

}  // namespace quantile
}  // namespace tokenprune
