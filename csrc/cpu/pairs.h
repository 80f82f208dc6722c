// The two groups of an image's patch tokens, and their most similar pairs.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../ops/bipartite_match_params.h"
#include "nearest_token.h"
#include "select.h"

namespace tokenprune {

// The patch tokens of one image, group B first: those are the candidates of group A.
template <typename value_t>
void order_groups(const BipartiteMatchParams& params,
                  const value_t* scores,  // [tokens]; unused by kAlternate
                  int32_t* tokens,        // [patches]
                  int32_t* columns) {     // [patches]
  const int64_t n = params.nearest.patches();
  const int64_t group_b = n - params.group_a();
  if (params.partition == Partition::kAlternate) {
    for (int64_t i = 0; i < n; ++i) {
      tokens[i % 2 ? i / 2 : group_b + i / 2] = static_cast<int32_t>(params.nearest.num_prefix + i);
    }
  } else {
    select(params.best(params.important()), scores, tokens);
    if (params.important_group() == 1) std::rotate(tokens, tokens + params.important(), tokens + n);
  }
  std::fill_n(columns, group_b, 0);
  std::fill(columns + group_b, columns + n, static_cast<int32_t>(group_b));
}

// The most similar pairs of one image.
template <typename acc_t>
void choose_pairs(const BipartiteMatchParams& params, const Found& found, int64_t* dropped, int64_t* match,
                  int64_t* kept) {
  using Limits = std::numeric_limits<acc_t>;
  const auto* similarity = static_cast<const acc_t*>(found.similarity);
  const int64_t n = params.nearest.patches();
  const int64_t group_b = n - params.group_a();
  std::vector<acc_t> score(params.nearest.tokens);
  std::vector<int32_t> order(n);
  for (int64_t place = 0; place < n; ++place) {
    const int32_t i = found.tokens[place];
    score[i] = place < group_b ? Limits::quiet_NaN() : found.candidate[i] < 0 ? -Limits::infinity() : similarity[i];
  }
  select(params.best(params.pairs), score.data(), order.data());
  std::copy_n(order.begin(), params.pairs, dropped);
  std::copy(order.begin() + params.pairs, order.end(), kept);
  for (int64_t i = 0; i < params.pairs; ++i) {
    match[i] = found.candidate[dropped[i]];
    if (match[i] < 0) match[i] = *std::min_element(found.tokens, found.tokens + group_b);
  }
}

}  // namespace tokenprune
