#include "../ops/head_reduced_sum.h"

#include <algorithm>
#include <string>
#include <type_traits>

#include "head_reduce.h"

namespace tokenprune {
namespace {

constexpr int64_t kGrain = 64 * 1024;  // values a thread should have to reduce before another one is worth waking

constexpr int64_t kAhead = 2;  // tokens whose rows are fetched before they are needed

// out[t] = the sum over the channels of the reduction over heads, for `tokens` tokens of an image.
template <int kBytes, bool kMax, typename value_t, typename acc_t>
[[gnu::always_inline]] inline void sum_tokens(const HeadReducedSumParams& params, const value_t* __restrict__ features,
                                              int64_t tokens, acc_t* __restrict__ out) {
  using Reduction = HeadReduction<kMax, acc_t>;
  constexpr int64_t kWidth = kStrip<acc_t>;
  const int64_t channels = params.channels;
  const int64_t whole = channels / kWidth * kWidth;
  const acc_t divisor = static_cast<acc_t>(params.divisor());
  for (int64_t t = 0; t < tokens; ++t) {
    const value_t* token = features + t * params.token_stride;
    if (t + kAhead < tokens) {
      prefetch(token + kAhead * params.token_stride, params.heads, params.head_stride, channels);
    }
    acc_t sums[kWidth] = {};
    for (int64_t c = 0; c < whole; c += kWidth) {
      HeadStrip<kMax, kBytes, acc_t>(token + c, params.heads, params.head_stride).add_to(sums);
    }
    for (int64_t c = whole; c < channels; ++c) {
      acc_t reduced = Reduction::kNothing;
      for (int64_t h = 0; h < params.heads; ++h) {
        reduced = Reduction::join(reduced, static_cast<acc_t>(token[h * params.head_stride + c]));
      }
      sums[c - whole] += reduced;
    }
#pragma GCC unroll 8
    for (int64_t half = kWidth / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) sums[i] += sums[half + i];
    }
    out[t] = sums[0] / divisor;
  }
}

Tensor head_reduced_sum_cpu(Tensor features, std::string head_reduce) {
  const HeadReducedSumParams params = check_head_reduced_sum(features, head_reduce);
  const int64_t n = params.tokens;
  const int64_t grain = std::max<int64_t>(1, kGrain / (params.heads * params.channels));
  Tensor out = torch::stable::new_empty(features, {params.batch, n}, accumulate_dtype(features));
  TOKENPRUNE_DISPATCH(features.scalar_type(), "head_reduced_sum", [&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto* values = vector_ptr<scalar_t>(features);
    acc_t* sums = data_ptr<acc_t>(out);
    const auto run = [&](auto max) {
      torch::stable::parallel_for(0, params.batch * n, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end;) {  // image by image
          const int64_t count = std::min(n - row % n, end - row);
          const auto* first = values + row / n * params.batch_stride + row % n * params.token_stride;
          with_vectors([&](auto bytes) __attribute__((always_inline)) {
            sum_tokens<bytes(), max()>(params, first, count, sums + row);
          });
          row += count;
        }
      });
    };
    params.head_reduce == HeadReduce::kMax ? run(std::true_type()) : run(std::false_type());
  });
  return out;
}

}  // namespace
}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  m.impl("head_reduced_sum", TORCH_BOX(&tokenprune::head_reduced_sum_cpu));
}
