// The search for the nearest more important token computes every similarity there is. The matching of the tokens that
// are not kept only looks at them again, where those of an image are few enough to be stored.
#include "../ops/peaks_match.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
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
void match_stored(const PeaksMatchParams& params, const Found& all, const std::vector<int32_t>& order, int64_t* match) {
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
void match_anew(const PeaksMatchParams& params, const Tensor& metric, const Results& results) {
  const int64_t* kept = data_ptr<const int64_t>(results.kept);
  const int64_t* dropped = data_ptr<const int64_t>(results.dropped);
  int64_t* match = data_ptr<int64_t>(results.match);
  const Order order = [&](int64_t image, int32_t* tokens, int32_t* columns) {
    std::copy_n(kept + image * params.keep, params.keep, tokens);
    std::copy_n(dropped + image * params.dropped(), params.dropped(), tokens + params.keep);
    std::fill_n(columns, params.keep, 0);
    std::fill_n(columns + params.keep, params.dropped(), static_cast<int32_t>(params.keep));
  };
  search_nearest(params.nearest, metric, order, false, [&](int64_t image, const Found& found) {
    for (int64_t i = image * params.dropped(); i < (image + 1) * params.dropped(); ++i) {
      const int64_t candidate = found.candidate[dropped[i]];
      match[i] = candidate < 0 ? dropped[i] : candidate;
    }
  });
}

template <typename acc_t>
void match_all(const PeaksMatchParams& params, const Tensor& metric, const Tensor& importance, const Results& results) {
  const int64_t n = params.nearest.patches();
  const bool stored = n <= kStored;
  const acc_t* important = data_ptr<const acc_t>(importance);
  const Order by_importance = [&](int64_t image, int32_t* tokens, int32_t* columns) {
    sort_best_first(important + image * params.nearest.tokens, params.nearest.num_prefix, n, tokens);
    std::iota(columns, columns + n, 0);
  };
  search_nearest(params.nearest, metric, by_importance, stored, [&](int64_t image, const Found& all) {
    std::vector<int32_t> order(n);
    choose(params, image, importance, static_cast<const acc_t*>(all.similarity), results, order);
    if (stored) match_stored<acc_t>(params, all, order, data_ptr<int64_t>(results.match) + image * params.dropped());
  });
  if (!stored && params.dropped() > 0) match_anew(params, metric, results);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> peaks_match_cpu(Tensor metric, Tensor importance, int64_t keep,
                                                           int64_t num_prefix, double exponent, bool) {
  const PeaksMatchParams params = check_peaks_match(metric, importance, keep, num_prefix, exponent);
  importance = as_contiguous(importance);
  const int64_t batch = params.nearest.batch;
  const Results results{allocate(importance, {batch, params.nearest.tokens}, importance.scalar_type()),
                        allocate(importance, {batch, keep}, ScalarType::Long),
                        allocate(importance, {batch, params.dropped()}, ScalarType::Long),
                        allocate(importance, {batch, params.dropped()}, ScalarType::Long)};
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
