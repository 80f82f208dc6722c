// The attention among the tokens that no pair drops is part of the attention among all, but for the sums of its rows:
// where an image's matrices can be held, they are formed once, and both rankings read them.
#include "../ops/zero_tprune.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "head_aggregate.h"
#include "operators.h"
#include "page_rank.h"
#include "pairs.h"
#include "workspace.h"

namespace tokenprune {
namespace {

// A sum of terms below this has lost some: terms vanish where they are e^-87 of their row's largest one.
template <typename acc_t>
constexpr acc_t kLeastSum = std::numeric_limits<acc_t>::min() * acc_t(1e10);

template <typename acc_t>
TOKENPRUNE_MULTIVERSION acc_t masked_sum(const acc_t* row, const acc_t* mask, int64_t n) {
  return sum_in_parts<acc_t>(n, [&](int64_t k) { return row[k] * mask[k]; });
}

template <typename acc_t>
TOKENPRUNE_MULTIVERSION void multiply(acc_t* __restrict__ values, const acc_t* __restrict__ mask, int64_t n) {
  for (int64_t k = 0; k < n; ++k) values[k] *= mask[k];
}

// The scores that page rank of `tokens` tokens begins with.
template <typename acc_t>
void write_start(bool class_start, int64_t tokens, acc_t* start) {
  std::fill_n(start, tokens, acc_t(1));
  if (class_start) start[0] = static_cast<acc_t>(std::sqrt(static_cast<double>(tokens)));
}

// scores[taken[i]] = left[i] for `count` tokens, minus infinity for the others of all n.
template <typename acc_t>
void write_scores(const acc_t* left, const int64_t* taken, int64_t count, int64_t n, acc_t* scores) {
  std::fill_n(scores, n, -std::numeric_limits<acc_t>::infinity());
  for (int64_t i = 0; i < count; ++i) scores[taken[i]] = left[i];
}

// What is held of one image between its rankings.
template <typename acc_t>
struct Held {
  Held(int64_t heads, int64_t tokens, int64_t stride) : matrices(heads * tokens * stride), ranks(heads * tokens) {}

  Workspace<acc_t> matrices;  // [heads, tokens, stride]
  std::vector<acc_t> ranks;   // [heads, tokens that are ranked]
};

// The tokens of an image that are left: the prefix, and the patch tokens in `kept`.
std::vector<int64_t> taken_tokens(const ZeroTPruneParams& params, const int64_t* kept) {
  std::vector<int64_t> taken(params.left());
  const int64_t prefix = params.num_prefix();
  for (int64_t i = 0; i < params.left(); ++i) taken[i] = i < prefix ? i : kept[i - prefix];
  return taken;
}

template <typename value_t, typename acc_t>
class Stages {
 public:
  Stages(const ZeroTPruneParams& params, const value_t* q, const value_t* k, acc_t* scores)
      : params_(params),
        q_(q),
        k_(k),
        scores_(scores),
        stride_(padded_columns<acc_t>(params.qk.tokens)),
        start_(start_of(params.qk.tokens)),
        left_start_(start_of(params.left())),
        in_flight_(params.qk.batch) {}

  // The groups of an image, by page rank of all its tokens.
  void order(int64_t image, int32_t* tokens, int32_t* columns) {
    const int64_t n = params_.qk.tokens;
    in_flight_[image] = std::make_unique<Held<acc_t>>(params_.qk.heads, n, stride_);
    Held<acc_t>& held = *in_flight_[image];
    torch::stable::parallel_for(0, params_.qk.heads, 1, [&](int64_t begin, int64_t end) {
      AttentionMatrix<value_t, acc_t> attention(params_.qk);
      PowerSteps<acc_t> steps(n, stride_);
      const Matrices<value_t, acc_t> work = matrices(image, n, nullptr, held);
      std::vector<acc_t> sums(n);
      for (int64_t h = begin; h < end; ++h) {
        acc_t* ranks = held.ranks.data() + h * n;
        std::fill_n(ranks, n, acc_t(0));
        const TokenRows<value_t> following = work.keys(std::min(h + 1, end - 1));
        attention.form(
            work.queries(h), work.keys(h), h + 1 < end ? &following : nullptr, sums.data(),
            [&](int64_t first) { return matrix(held, h) + first * stride_; },
            [&](const acc_t* terms, int64_t first, int64_t count) {
              steps.add(terms, count, sums.data() + first, start_.data() + first, ranks);
            });
      }
    });
    std::vector<acc_t> rough(n);
    aggregate(params_.heads(n), held.ranks.data(), rough.data());
    order_groups(params_.match, rough.data(), tokens, columns);
  }

  // The scores of an image, by page rank of the patch tokens in `kept` and the prefix.
  void rank_left(int64_t image, const std::vector<int64_t>& kept) {
    const int64_t n = params_.qk.tokens, left = params_.left();
    const std::unique_ptr<Held<acc_t>> held = std::move(in_flight_[image]);
    const std::vector<int64_t> taken = taken_tokens(params_, kept.data());
    std::vector<acc_t> mask(n);
    for (const int64_t i : taken) mask[i] = 1;
    torch::stable::parallel_for(0, params_.qk.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) {
        if (rank_held(*held, h, taken, mask)) continue;
        const Matrices<value_t, acc_t> work = matrices(image, left, taken.data(), *held);
        rank_small(work, h, h + 1);
      }
    });
    std::vector<acc_t> combined(left);
    aggregate(params_.heads(left), held->ranks.data(), combined.data());
    write_scores(combined.data(), taken.data(), left, n, scores_ + image * n);
  }

 private:
  std::vector<acc_t> start_of(int64_t tokens) const {
    std::vector<acc_t> start(tokens);
    write_start(params_.class_start, tokens, start.data());
    return start;
  }

  acc_t* matrix(const Held<acc_t>& held, int64_t h) const {
    return held.matrices.data() + h * params_.qk.tokens * stride_;
  }

  // One image's heads for page rank of `tokens` tokens, which `taken` names.
  Matrices<value_t, acc_t> matrices(int64_t image, int64_t tokens, const int64_t* taken, Held<acc_t>& held) const {
    WprQkParams params{params_.qk, {params_.qk.heads, tokens, params_.max_iters, threshold(), 0}, 0, params_.qk.tokens};
    params.qk.batch = 1;
    params.qk.tokens = tokens;
    return {params,
            q_ + params_.qk.q_offset(image, 0),
            k_ + params_.qk.k_offset(image, 0),
            left_start_.data(),
            taken,
            held.ranks.data()};
  }
  double threshold() const { return params_.tol * static_cast<double>(params_.left()); }

  // Page rank of the tokens that are left, from the matrix of all; false where it does not tell: too little of a row's
  // sum is left, or it is NaN, which may come from a dropped token, even times 0.
  bool rank_held(Held<acc_t>& held, int64_t h, const std::vector<int64_t>& taken, const std::vector<acc_t>& mask) {
    const int64_t n = params_.qk.tokens, left = params_.left();
    const acc_t* terms = matrix(held, h);
    PowerSteps<acc_t> steps(n, stride_);
    std::vector<acc_t> s(n), next(n), sums(n);
    for (int64_t i = 0; i < left; ++i) s[taken[i]] = left_start_[i];
    bool first_step = true, good = true;
    const WprParams wpr{1, n, params_.max_iters, threshold(), 0};
    power_iterate(wpr, s.data(), next.data(), [&](const acc_t* from, acc_t* to) {
      steps.run(terms, sums.data(), from, to, [&](int64_t first, int64_t count) {
        for (int64_t r = first; first_step && r < first + count; ++r) {
          sums[r] = masked_sum(terms + r * stride_, mask.data(), n);
          good &= sums[r] >= kLeastSum<acc_t>;
        }
      });
      multiply(to, mask.data(), n);
      first_step = false;
    });
    acc_t* ranks = held.ranks.data() + h * left;
    for (int64_t i = 0; i < left; ++i) ranks[i] = s[taken[i]];
    return good;
  }

  ZeroTPruneParams params_;
  const value_t* q_;
  const value_t* k_;
  acc_t* scores_;  // [batch, tokens]
  int64_t stride_;
  std::vector<acc_t> start_;                             // [tokens]
  std::vector<acc_t> left_start_;                        // [tokens that are left]
  std::vector<std::unique_ptr<Held<acc_t>>> in_flight_;  // [batch]
};

// For what cannot be held.
struct Cpu {
  static constexpr auto wpr_qk = wpr_qk_cpu;
  static constexpr auto head_aggregate = head_aggregate_cpu;
  static constexpr auto bipartite_match = bipartite_match_cpu;

  static std::optional<Tensor> start(const ZeroTPruneParams& params, const Tensor& q, int64_t tokens) {
    Tensor scores = allocate(q, {tokens}, accumulate_dtype(q));
    TOKENPRUNE_DISPATCH(scores.scalar_type(), "zero_tprune",
                        [&] { write_start(params.class_start, tokens, data_ptr<scalar_t>(scores)); });
    return scores;
  }

  static Tensor spread(const ZeroTPruneParams& params, const Tensor& left, const Tensor& kept) {
    const int64_t n = params.qk.tokens;
    Tensor scores = allocate(left, {params.qk.batch, n}, left.scalar_type());
    TOKENPRUNE_DISPATCH(left.scalar_type(), "zero_tprune", [&] {
      for (int64_t image = 0; image < params.qk.batch; ++image) {
        const std::vector<int64_t> taken =
            taken_tokens(params, data_ptr<const int64_t>(kept) + image * params.match.kept());
        write_scores(data_ptr<const scalar_t>(left) + image * params.left(), taken.data(), params.left(), n,
                     data_ptr<scalar_t>(scores) + image * n);
      }
    });
    return scores;
  }
};

bool can_be_held(const QkParams& qk, int64_t element_bytes, int64_t columns) {
  const int64_t bytes = qk.tokens * columns * element_bytes;
  const int64_t threads = torch::stable::get_num_threads();
  return bytes <= kThreadBytes && bytes * qk.heads * std::min(threads, qk.batch) <= kHeldBytes;
}

ZeroTPruneResults zero_tprune_cpu(Tensor q, Tensor k, Tensor metric, double scale, int64_t r, bool class_start,
                                  int64_t max_iters, double tol, double vmin, double vmax, int64_t num_prefix,
                                  std::string partition, std::string similarity, bool) {
  const ZeroTPruneParams params = check_zero_tprune(q, k, metric, scale, r, class_start, max_iters, tol, vmin, vmax,
                                                    num_prefix, partition, similarity);
  const int64_t batch = params.qk.batch;
  const ScalarType dtype = accumulate_dtype(q);
  const bool wide = dtype == ScalarType::Double;
  const int64_t columns = wide ? padded_columns<double>(params.qk.tokens) : padded_columns<float>(params.qk.tokens);
  if (!can_be_held(params.qk, wide ? 8 : 4, columns)) {
    return run_stages<Cpu>(params, q, k, metric, partition, similarity, false);
  }
  Tensor scores = allocate(q, {batch, params.qk.tokens}, dtype);
  Tensor dropped = allocate(q, {batch, r}, ScalarType::Long);
  Tensor match = allocate(q, {batch, r}, ScalarType::Long);
  const auto choose = accumulate_dtype(metric) == ScalarType::Double ? choose_pairs<double> : choose_pairs<float>;
  TOKENPRUNE_DISPATCH(q.scalar_type(), "zero_tprune", [&] {
    using acc_t = accumulate_t<scalar_t>;
    Stages<vectorizable_t<scalar_t>, acc_t> stages(params, vector_ptr<scalar_t>(q), vector_ptr<scalar_t>(k),
                                                   data_ptr<acc_t>(scores));
    const Order order = [&](int64_t image, int32_t* tokens, int32_t* to) { stages.order(image, tokens, to); };
    const Finish finish = [&](int64_t image, const Found& found) {
      std::vector<int64_t> kept(params.match.kept());
      choose(params.match, found, data_ptr<int64_t>(dropped) + image * r, data_ptr<int64_t>(match) + image * r,
             kept.data());
      stages.rank_left(image, kept);
    };
    search_nearest(params.match.nearest, metric, order, false, finish);
  });
  return {scores, dropped, match};
}

}  // namespace
}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("zero_tprune", TORCH_BOX(&tokenprune::zero_tprune_cpu)); }
