#pragma once

#include <cstdint>

#include "similarity_params.h"

namespace tokenprune {

// For every patch token of metric [batch, heads, tokens, channels], summed over the heads, the most similar patch token
// of lower rank. The channels of a token lie side by side, the other strides are free.
struct NearestTokenParams {
  int64_t batch;
  int64_t heads;
  int64_t tokens;
  int64_t channels;
  int64_t batch_stride, head_stride, token_stride;
  int64_t num_prefix;
  Similarity similarity;

  constexpr int64_t patches() const { return tokens - num_prefix; }
};

}  // namespace tokenprune
