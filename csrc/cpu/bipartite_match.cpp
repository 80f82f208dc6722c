#include "../ops/bipartite_match.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "nearest_token.h"
#include "select.h"
#include "simd.h"

namespace tokenprune {
namespace {

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

std::tuple<Tensor, Tensor, Tensor> bipartite_match_cpu(Tensor metric, std::optional<Tensor> scores, int64_t r,
                                                       int64_t num_prefix, std::string partition,
                                                       std::string similarity_name, bool) {
  const BipartiteMatchParams params = check_bipartite_match(metric, scores, r, num_prefix, partition, similarity_name);
  const int64_t batch = params.nearest.batch;
  const Tensor values = scores.has_value() ? as_contiguous(*scores) : metric;
  Tensor dropped = allocate(metric, {batch, r}, ScalarType::Long);
  Tensor match = allocate(metric, {batch, r}, ScalarType::Long);
  Tensor kept = allocate(metric, {batch, params.kept()}, ScalarType::Long);
  int64_t* drops = data_ptr<int64_t>(dropped);
  int64_t* matches = data_ptr<int64_t>(match);
  int64_t* keeps = data_ptr<int64_t>(kept);
  const bool wide = accumulate_dtype(metric) == ScalarType::Double;
  const Finish finish = [&](int64_t image, const Found& found) {
    const auto choose = wide ? choose_pairs<double> : choose_pairs<float>;
    choose(params, found, drops + image * r, matches + image * r, keeps + image * params.kept());
  };
  TOKENPRUNE_DISPATCH(values.scalar_type(), "bipartite_match", [&] {
    const auto* s = vector_ptr<scalar_t>(values);
    const Order order = [&](int64_t image, int32_t* tokens, int32_t* columns) {
      order_groups(params, s + image * params.nearest.tokens, tokens, columns);
    };
    search_nearest(params.nearest, metric, order, false, finish);
  });
  return {dropped, match, kept};
}

}  // namespace
}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  m.impl("bipartite_match", TORCH_BOX(&tokenprune::bipartite_match_cpu));
}
