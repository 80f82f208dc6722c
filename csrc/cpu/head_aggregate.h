// Scores of all heads as one score a token, for one image.
#pragma once

#include <algorithm>
#include <cmath>

#include "../ops/head_aggregate_params.h"
#include "simd.h"

namespace tokenprune {

// Population variance, in two passes.
template <typename value_t, typename acc_t>
TOKENPRUNE_MULTIVERSION acc_t variance(const value_t* scores, int64_t n) {
  const acc_t count = static_cast<acc_t>(n);
  const acc_t mean = sum_in_parts<acc_t>(n, [&](int64_t i) { return static_cast<acc_t>(scores[i]); }) / count;
  const auto square = [&](int64_t i) {
    const acc_t off = static_cast<acc_t>(scores[i]) - mean;
    return off * off;
  };
  return sum_in_parts<acc_t>(n, square) / count;
}

template <typename value_t, typename acc_t>
TOKENPRUNE_MULTIVERSION void add_squares(const value_t* __restrict__ scores, int64_t n, acc_t* __restrict__ out) {
  for (int64_t i = 0; i < n; ++i) out[i] += static_cast<acc_t>(scores[i]) * static_cast<acc_t>(scores[i]);
}

template <typename value_t, typename acc_t>
void aggregate(const HeadAggregateParams& params,
               const value_t* scores,  // [heads, tokens]
               acc_t* out) {           // [tokens]
  const int64_t patches = params.tokens - params.num_prefix;
  std::fill_n(out, params.tokens, acc_t(0));
  out += params.num_prefix;
  scores += params.num_prefix;
  int64_t kept = 0;
  for (int64_t h = 0; h < params.heads; ++h) {
    const value_t* head = scores + h * params.tokens;
    const acc_t spread = variance<value_t, acc_t>(head, patches);
    if (static_cast<acc_t>(params.vmin) <= spread && spread <= static_cast<acc_t>(params.vmax)) {
      add_squares(head, patches, out);
      ++kept;
    }
  }
  if (kept == 0) {
    for (int64_t h = 0; h < params.heads; ++h) add_squares(scores + h * params.tokens, patches, out);
    kept = params.heads;
  }
  for (int64_t i = 0; i < patches; ++i) out[i] = std::sqrt(out[i] / static_cast<acc_t>(kept));
}

}  // namespace tokenprune
