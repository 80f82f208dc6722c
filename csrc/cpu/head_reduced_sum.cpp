#include "../ops/head_reduced_sum.h"

#include <algorithm>
#include <string>
#include <type_traits>

#include "head_reduce.h"

namespace tokenprune {
namespace {

constexpr int64_t kGrain = 128 * 1024;  // values a thread should have to reduce before another one is worth waking

// out[t] = the sum over the channels of the reduction over heads, for `tokens` tokens of an image.
template <int kBytes, bool kMax, typename value_t, typename acc_t>
[[gnu::always_inline]] inline void sum_tokens(const HeadReducedSumParams& params, const value_t* __restrict__ features,
                                              int64_t tokens, acc_t* __restrict__ out) {
  using Reduction = HeadReduction<kMax, acc_t>;
  constexpr int64_t kSums = VectorsOf<kBytes, acc_t>::kSums;
  const int64_t channels = params.channels;
  const acc_t divisor = static_cast<acc_t>(params.divisor());
  for (int64_t t = 0; t < tokens; ++t, features += params.token_stride) {
    acc_t sums[kSums] = {};
    int64_t c = 0;
    const auto add = [&](auto width) __attribute__((always_inline)) {
      for (; c + width() <= channels; c += width()) {
        HeadStrip<kMax, kBytes, width(), acc_t>(features + c, params.heads, params.head_stride)
            .template add_to<kSums>(sums);
      }
    };
    add(std::integral_constant<int64_t, 4 * kSums>());  // wide: the heads' rows are read once, from front to back
    add(std::integral_constant<int64_t, kSums>());
    for (; c < channels; ++c) {
      acc_t reduced = Reduction::kNothing;
      for (int64_t h = 0; h < params.heads; ++h) {
        reduced = Reduction::join(reduced, static_cast<acc_t>(features[h * params.head_stride + c]));
      }
      sums[c % kSums] += reduced;
    }
#pragma GCC unroll 8
    for (int64_t half = kSums / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) sums[i] += sums[half + i];
    }
    out[t] = sums[0] / divisor;
  }
}

Tensor head_reduced_sum_cpu(Tensor features, std::string head_reduce) {
  const HeadReducedSumParams params = check_head_reduced_sum(features, head_reduce);
  const int64_t n = params.tokens;
  const int64_t grain = std::max<int64_t>(1, kGrain / (params.heads * params.channels));
  Tensor out = allocate(features, {params.batch, n}, accumulate_dtype(features));
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
