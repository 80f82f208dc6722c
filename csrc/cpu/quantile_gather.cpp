#include "../ops/quantile_gather.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <tuple>

#include "gather.h"
#include "simd.h"

namespace tokenprune {
namespace {

constexpr int64_t kGrain = 16 * 1024;  // tokens a thread should have to look at before another one is worth waking

// Cumulative sums of n scores; returns the last.
template <typename value_t>
double form_sums(const value_t* scores, int64_t n, double* sums) {
  double before = 0;
  for (int64_t begin = 0; begin < n; begin += quantile::kRun) {
    const int64_t end = std::min<int64_t>(n, begin + quantile::kRun);
    double within = 0;
    for (int64_t i = begin; i < end; ++i) {
      within += quantile::weight(static_cast<double>(scores[i]));
      sums[i] = before + within;
    }
    before += within;
  }
  return before;
}

// Marks the tokens that a quantile falls on; returns how many there are.
int64_t mark_sampled(const double* sums, int64_t n, double total, int64_t keep, bool* sampled) {
  int64_t count = 0, next = 1;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t first = next;
    while (next <= keep && quantile::reaches(sums[i], total, next, keep)) ++next;
    sampled[i] = next > first;
    count += sampled[i];
  }
  return count;
}

// What is known of the tokens of one image that leave.
template <typename scalar_t>
struct Places {
  int64_t* index;                 // [keep]
  accumulate_t<scalar_t>* sizes;  // [num_prefix + keep]
  scalar_t* log_sizes;            // [num_prefix + keep]

  void fill(const TopkGatherParams& params, const bool* sampled, int64_t count) const {
    std::fill_n(sizes, params.num_prefix, accumulate_t<scalar_t>(1));
    std::fill_n(log_sizes, params.num_prefix, scalar_t(0.0f));
    const scalar_t nothing(-std::numeric_limits<float>::infinity());
    int64_t padding = params.keep - count;
    for (int64_t i = 0, place = 0; place < params.keep; ++i) {
      if (!sampled[i] && padding-- <= 0) continue;
      index[place] = params.num_prefix + i;
      sizes[params.num_prefix + place] = sampled[i] ? 1 : 0;
      log_sizes[params.num_prefix + place] = sampled[i] ? scalar_t(0.0f) : nothing;
      ++place;
    }
  }
};

template <typename scalar_t, typename value_t>
void sample_all(const TopkGatherParams& params, const value_t* scores, const Places<scalar_t>& places) {
  const int64_t patches = params.tokens - params.num_prefix, rows = params.tokens_out();
  torch::stable::parallel_for(0, params.batch, std::max<int64_t>(1, kGrain / patches), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> sums(new double[patches]);
    const std::unique_ptr<bool[]> sampled(new bool[patches]);
    for (int64_t b = begin; b < end; ++b) {
      const double total = form_sums(scores + b * params.tokens + params.num_prefix, patches, sums.get());
      const int64_t count = mark_sampled(sums.get(), patches, total, params.keep, sampled.get());
      const Places<scalar_t> mine{places.index + b * params.keep, places.sizes + b * rows, places.log_sizes + b * rows};
      mine.fill(params, sampled.get(), count);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantile_gather_cpu(Tensor x, Tensor scores, int64_t keep,
                                                               int64_t num_prefix) {
  const TopkGatherParams params = check_quantile_gather(x, scores, keep, num_prefix);
  x = as_contiguous(x);
  scores = as_contiguous(scores);
  const int64_t rows = params.tokens_out();
  Tensor tokens = allocate(x, {params.batch, rows, params.channels}, x.scalar_type());
  Tensor index = allocate(x, {params.batch, params.keep}, ScalarType::Long);
  Tensor sizes = allocate(x, {params.batch, rows}, accumulate_dtype(x));
  Tensor log_sizes = allocate(x, {params.batch, 1, 1, rows}, x.scalar_type());
  TOKENPRUNE_DISPATCH(x.scalar_type(), "quantile_gather", [&] {
    const Places<scalar_t> places{data_ptr<int64_t>(index), data_ptr<accumulate_t<scalar_t>>(sizes),
                                  data_ptr<scalar_t>(log_sizes)};
    TOKENPRUNE_DISPATCH(scores.scalar_type(), "quantile_gather",
                        [&] { sample_all(params, vector_ptr<scalar_t>(scores), places); });
    gather_all(params, x.data_ptr(), data_ptr<int64_t>(index), params.keep,
               params.channels * static_cast<int64_t>(sizeof(scalar_t)), tokens.data_ptr());
  });
  return {tokens, index, sizes, log_sizes};
}

}  // namespace
}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  m.impl("quantile_gather", TORCH_BOX(&tokenprune::quantile_gather_cpu));
}
