// Selection of the best patch tokens of one image, as csrc/cuda/kernels/select.cuh does it on a GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "../ops/topk_gather_params.h"

namespace tokenprune {

// The order of tokens by their scores: higher first, NaN last, equal ones by position.
template <typename value_t>
struct BestFirst {
  const value_t* scores;  // [tokens]

  bool operator()(int32_t i, int32_t j) const {
    const double a = static_cast<double>(scores[i]);
    const double b = static_cast<double>(scores[j]);
    const bool a_nan = a != a;
    const bool b_nan = b != b;
    if (a_nan != b_nan) return b_nan;
    if (!a_nan && a != b) return a > b;
    return i < j;
  }
};

// The patch positions of one image in that order.
template <typename value_t>
void sort_best_first(const value_t* scores, int64_t num_prefix, int64_t patches, int32_t* order) {
  std::iota(order, order + patches, static_cast<int32_t>(num_prefix));
  std::sort(order, order + patches, BestFirst<value_t>{scores});
}

// Puts the patch positions of one image into `order`: the kept ones first, then the dropped ones, each ascending.
template <typename value_t>
void select(const TopkGatherParams& params,
            const value_t* scores,  // [tokens]
            int32_t* order) {       // [tokens - num_prefix]
  const int64_t patches = params.tokens - params.num_prefix;
  std::iota(order, order + patches, static_cast<int32_t>(params.num_prefix));
  if (params.keep == 0) return;
  const BestFirst<value_t> before{scores};
  std::nth_element(order, order + params.keep - 1, order + patches, before);
  const int32_t last = order[params.keep - 1];
  int32_t* kept = order;
  int32_t* dropped = order + params.keep;
  for (int64_t i = params.num_prefix; i < params.tokens; ++i) {
    const auto position = static_cast<int32_t>(i);
    *(before(last, position) ? dropped : kept)++ = position;
  }
}

}  // namespace tokenprune
