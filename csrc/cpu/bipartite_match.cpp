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

// The group of every patch token, 0 for B and 1 for A: as ranks they leave A the tokens of B.
template <typename value_t>
void find_groups(const BipartiteMatchParams& params,
                 const value_t* scores,  // [tokens]; unused by kAlternate
                 int32_t* order,         // [patches]
                 int64_t* group) {       // [tokens]
  const int64_t n = params.nearest.patches();
  if (params.partition == Partition::kAlternate) {
    for (int64_t i = 0; i < n; ++i) group[params.nearest.num_prefix + i] = 1 - i % 2;
    return;
  }
  select(params.best(params.important()), scores, order);
  for (int64_t i = 0; i < n; ++i) {
    group[order[i]] = i < params.important() ? params.important_group() : 1 - params.important_group();
  }
}

Tensor group_all(const BipartiteMatchParams& params, const Tensor& metric, const std::optional<Tensor>& scores) {
  const int64_t tokens = params.nearest.tokens;
  Tensor group = torch::stable::new_empty(metric, {params.nearest.batch, tokens}, ScalarType::Long);
  const Tensor values = scores.has_value() ? torch::stable::contiguous(*scores) : metric;
  TOKENPRUNE_DISPATCH(values.scalar_type(), "bipartite_match", [&] {
    const auto* s = vector_ptr<scalar_t>(values);
    torch::stable::parallel_for(0, params.nearest.batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> order(params.nearest.patches());
      for (int64_t b = begin; b < end; ++b) {
        find_groups(params, s + b * tokens, order.data(), data_ptr<int64_t>(group) + b * tokens);
      }
    });
  });
  return group;
}

// The most similar pairs of one image.
template <typename acc_t>
void choose_pairs(const BipartiteMatchParams& params,
                  const int64_t* group,       // [tokens]
                  const int64_t* partner,     // [tokens], -1: none
                  const acc_t* similarity,    // [tokens]
                  std::vector<acc_t>& score,  // [tokens]
                  std::vector<int32_t>& order, int64_t* dropped, int64_t* match, int64_t* kept) {
  using Limits = std::numeric_limits<acc_t>;
  const int64_t first = params.nearest.num_prefix;
  for (int64_t i = first; i < params.nearest.tokens; ++i) {
    score[i] = group[i] == 0 ? Limits::quiet_NaN() : partner[i] < 0 ? -Limits::infinity() : similarity[i];
  }
  select(params.best(params.pairs), score.data(), order.data());
  std::copy_n(order.begin(), params.pairs, dropped);
  std::copy(order.begin() + params.pairs, order.end(), kept);
  for (int64_t i = 0; i < params.pairs; ++i) {
    match[i] = partner[dropped[i]];
    if (match[i] < 0) match[i] = std::find(group + first, group + params.nearest.tokens, 0) - group;
  }
}

std::tuple<Tensor, Tensor, Tensor> bipartite_match_cpu(Tensor metric, std::optional<Tensor> scores, int64_t r,
                                                       int64_t num_prefix, std::string partition,
                                                       std::string similarity_name, bool) {
  const BipartiteMatchParams params = check_bipartite_match(metric, scores, r, num_prefix, partition, similarity_name);
  const int64_t batch = params.nearest.batch;
  const int64_t tokens = params.nearest.tokens;
  metric = torch::stable::contiguous(metric);
  const Tensor group = group_all(params, metric, scores);
  const auto [similarity, partner] = nearest_cpu(params.nearest, metric, group);
  Tensor dropped = torch::stable::new_empty(metric, {batch, r}, ScalarType::Long);
  Tensor match = torch::stable::new_empty(metric, {batch, r}, ScalarType::Long);
  Tensor kept = torch::stable::new_empty(metric, {batch, params.kept()}, ScalarType::Long);
  const int64_t* groups = data_ptr<int64_t>(group);
  const int64_t* partners = data_ptr<int64_t>(partner);
  const auto choose = [&](const auto* similarities) {
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<std::decay_t<decltype(*similarities)>> score(tokens);
      std::vector<int32_t> order(params.nearest.patches());
      for (int64_t b = begin; b < end; ++b) {
        choose_pairs(params, groups + b * tokens, partners + b * tokens, similarities + b * tokens, score, order,
                     data_ptr<int64_t>(dropped) + b * r, data_ptr<int64_t>(match) + b * r,
                     data_ptr<int64_t>(kept) + b * params.kept());
      }
    });
  };
  if (similarity.scalar_type() == ScalarType::Double) {
    choose(data_ptr<const double>(similarity));
  } else {
    choose(data_ptr<const float>(similarity));
  }
  return {dropped, match, kept};
}

}  // namespace
}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  m.impl("bipartite_match", TORCH_BOX(&tokenprune::bipartite_match_cpu));
}
