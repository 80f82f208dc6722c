// Selection of the best patch tokens of one image, as csrc/cuda/kernels/select.cuh does it on a GPU.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "../ops/topk_gather_params.h"
#include "simd.h"

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

// A score as a whole number in that order; 0 and -0 are the same one.
inline int32_t sort_key(float score) {
  const auto bits = std::bit_cast<int32_t>(score + 0.0f);
  return score != score ? std::numeric_limits<int32_t>::min() : bits ^ (bits >> 31 & 0x7fffffff);
}
inline int64_t sort_key(double score) {
  const auto bits = std::bit_cast<int64_t>(score + 0.0);
  return score != score ? std::numeric_limits<int64_t>::min() : bits ^ (bits >> 63 & 0x7fffffffffffffff);
}

// larger[i] = how many keys are larger than keys[i]. For as many keys as there are patches this takes less time than
// sorting: every step of it goes to whole vectors, and none is a branch.
template <typename key_t>
TOKENPRUNE_MULTIVERSION void count_larger(const key_t* __restrict__ keys, int64_t n, key_t* __restrict__ larger) {
  for (int64_t i = 0; i < n; ++i) larger[i] = 0;
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < n; ++i) larger[i] += keys[j] > keys[i];
  }
}

constexpr int64_t kCounted = 1024;  // tokens that are sorted by counting

// The patch positions of one image in that order.
template <typename value_t>
void sort_best_first(const value_t* scores, int64_t num_prefix, int64_t patches, int32_t* order) {
  if (patches > kCounted) {
    std::iota(order, order + patches, static_cast<int32_t>(num_prefix));
    std::sort(order, order + patches, BestFirst<value_t>{scores});
    return;
  }
  using key_t = decltype(sort_key(scores[0]));
  std::vector<key_t> keys(patches), place(patches), taken(patches);
  for (int64_t i = 0; i < patches; ++i) keys[i] = sort_key(scores[num_prefix + i]);
  count_larger(keys.data(), patches, place.data());
  for (int64_t i = 0; i < patches; ++i) {  // equal ones have the same place, the first of theirs
    order[place[i] + taken[place[i]]++] = static_cast<int32_t>(num_prefix + i);
  }
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
