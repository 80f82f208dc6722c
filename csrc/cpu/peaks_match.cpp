// The search for the nearest more important token computes every similarity there is. The matching of the tokens that
// are not kept only looks at them again, where those of an image are few enough to be stored.
#include "../ops/peaks_match.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "best_of_row.h"
#include "nearest_token.h"
#include "select.h"

namespace tokenprune {
namespace {

constexpr int64_t kStored = 1024;  // patch tokens whose similarities are stored
constexpr int32_t kNobody = std::numeric_limits<int32_t>::max();

struct Results {
  Tensor score, kept, dropped, match;
};

Tensor rank_all(const NearestTokenParams& params, const Tensor& importance) {
  Tensor rank = torch::stable::new_empty(importance, {params.batch, params.tokens}, ScalarType::Long);
  TOKENPRUNE_DISPATCH(importance.scalar_type(), "peaks_match", [&] {
    torch::stable::parallel_for(0, params.batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> order(params.patches());
      for (int64_t b = begin; b < end; ++b) {
        sort_best_first(data_ptr<scalar_t>(importance) + b * params.tokens, params.num_prefix, order);
        int64_t* ranks = data_ptr<int64_t>(rank) + b * params.tokens;
        std::fill_n(ranks, params.num_prefix, int64_t(0));
        for (int64_t place = 0; place < params.patches(); ++place) ranks[order[place]] = place;
      }
    });
  });
  return rank;
}

// Scores of one image, and who is kept by them: `order` has the kept patch tokens first, then the others.
template <typename acc_t>
void choose(const PeaksMatchParams& params, int64_t image, const Tensor& importance, const acc_t* near,
            const Results& results, std::vector<int32_t>& order) {
  const int64_t n = params.nearest.tokens;
  const acc_t* important = data_ptr<acc_t>(importance) + image * n;
  acc_t* score = data_ptr<acc_t>(results.score) + image * n;
  std::fill_n(score, params.nearest.num_prefix, acc_t(0));
  for (int64_t i = params.nearest.num_prefix; i < n; ++i) {
    const acc_t weight = params.exponent == 1 ? important[i] : std::pow(important[i], acc_t(params.exponent));
    score[i] = weight * (1 - near[i]);
  }
  select(params.best(), score, order.data());
  std::copy_n(order.begin(), params.keep, data_ptr<int64_t>(results.kept) + image * params.keep);
  std::copy(order.begin() + params.keep, order.end(), data_ptr<int64_t>(results.dropped) + image * params.dropped());
}

// The token of this row is a candidate of all places before it: best[c] and partner[c] are the best ones so far.
template <typename acc_t>
TOKENPRUNE_MULTIVERSION void offer(const acc_t* __restrict__ row, int64_t count, int32_t token,
                                   acc_t* __restrict__ best, int32_t* __restrict__ partner) {
  for (int64_t c = 0; c < count; ++c) {
    const bool better = row[c] > best[c] || (row[c] == best[c] && token < partner[c]);
    best[c] = better ? row[c] : best[c];
    partner[c] = better ? token : partner[c];
  }
}

// out[c] = row[c] where the penalty is 0, else minus infinity.
template <typename acc_t>
TOKENPRUNE_MULTIVERSION void add(const acc_t* __restrict__ row, const acc_t* __restrict__ penalty, int64_t count,
                                 acc_t* __restrict__ out) {
  for (int64_t c = 0; c < count; ++c) out[c] = row[c] + penalty[c];
}

// Matches of one image from its similarities. What is kept may stand before a place, in its row, or behind it.
template <typename acc_t>
void match_stored(const PeaksMatchParams& params, const Similarities& all, const std::vector<int32_t>& order,
                  int64_t* match) {
  constexpr acc_t kNone = -std::numeric_limits<acc_t>::infinity();
  const int64_t n = params.nearest.patches();
  std::vector<acc_t> by_token(params.nearest.tokens, kNone), penalty(all.stride), row(all.stride), best(all.stride);
  std::vector<int32_t> partner(all.stride, kNobody), matched(params.nearest.tokens);
  for (int64_t i = 0; i < params.keep; ++i) by_token[order[i]] = 0;
  for (int64_t p = 0; p < n; ++p) penalty[p] = by_token[all.tokens[p]];
  for (int64_t p = 0; p < n; ++p) {
    const acc_t* similarity = static_cast<const acc_t*>(all.rows) + p * all.stride;
    best[p] = kNone;
    if (penalty[p] == 0) {
      offer(similarity, p, all.tokens[p], best.data(), partner.data());
      continue;
    }
    int64_t index = -1;
    add(similarity, penalty.data(), p, row.data());
    find_best(row.data(), all.tokens, p, &best[p], &index);
    if (index < 0) best[p] = kNone;
    partner[p] = index < 0 ? kNobody : static_cast<int32_t>(index);
  }
  for (int64_t p = 0; p < n; ++p) matched[all.tokens[p]] = partner[p] == kNobody ? all.tokens[p] : partner[p];
  for (int64_t i = 0; i < params.dropped(); ++i) match[i] = matched[order[params.keep + i]];
}

// The same with another search, for any number of tokens.
template <typename acc_t>
void match_anew(const PeaksMatchParams& params, const Tensor& metric, const Tensor& importance, const Tensor& near,
                const Results& results) {
  const int64_t n = params.nearest.tokens;
  const Tensor group = torch::stable::new_empty(metric, {params.nearest.batch, n}, ScalarType::Long);
  int64_t* groups = data_ptr<int64_t>(group);
  std::fill_n(groups, params.nearest.batch * n, int64_t(0));
  std::vector<int32_t> order(params.nearest.patches());
  for (int64_t b = 0; b < params.nearest.batch; ++b) {
    choose(params, b, importance, data_ptr<const acc_t>(near) + b * n, results, order);
    for (int64_t i = params.keep; i < params.nearest.patches(); ++i) groups[b * n + order[i]] = 1;
  }
  if (params.dropped() == 0) return;
  const Tensor index = std::get<1>(nearest_cpu(params.nearest, metric, group));
  const int64_t* dropped = data_ptr<int64_t>(results.dropped);
  int64_t* match = data_ptr<int64_t>(results.match);
  for (int64_t i = 0; i < params.nearest.batch * params.dropped(); ++i) {
    const int64_t found = data_ptr<int64_t>(index)[i / params.dropped() * n + dropped[i]];
    match[i] = found < 0 ? dropped[i] : found;
  }
}

template <typename acc_t>
void match_all(const PeaksMatchParams& params, const Tensor& metric, const Tensor& importance, const Results& results) {
  const Tensor rank = rank_all(params.nearest, importance);
  if (params.nearest.patches() > kStored) {
    match_anew<acc_t>(params, metric, importance, std::get<0>(nearest_cpu(params.nearest, metric, rank)), results);
    return;
  }
  const Follow follow = [&](int64_t image, const Similarities& all) {
    std::vector<int32_t> order(params.nearest.patches());
    choose(params, image, importance, static_cast<const acc_t*>(all.largest), results, order);
    match_stored<acc_t>(params, all, order, data_ptr<int64_t>(results.match) + image * params.dropped());
  };
  nearest_cpu(params.nearest, metric, rank, &follow);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> peaks_match_cpu(Tensor metric, Tensor importance, int64_t keep,
                                                           int64_t num_prefix, double exponent, bool) {
  const PeaksMatchParams params = check_peaks_match(metric, importance, keep, num_prefix, exponent);
  metric = torch::stable::contiguous(metric);
  importance = torch::stable::contiguous(importance);
  const int64_t batch = params.nearest.batch;
  const Results results{torch::stable::new_empty(importance, {batch, params.nearest.tokens}),
                        torch::stable::new_empty(importance, {batch, keep}, ScalarType::Long),
                        torch::stable::new_empty(importance, {batch, params.dropped()}, ScalarType::Long),
                        torch::stable::new_empty(importance, {batch, params.dropped()}, ScalarType::Long)};
  if (importance.scalar_type() == ScalarType::Double) {
    match_all<double>(params, metric, importance, results);
  } else {
    match_all<float>(params, metric, importance, results);
  }
  return {results.score, results.kept, results.dropped, results.match};
}

}  // namespace
}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("peaks_match", TORCH_BOX(&tokenprune::peaks_match_cpu)); }
