#pragma once

#include <cstdint>

#include "similarity_params.h"

namespace tokenprune {

// For every patch token of metric [batch, tokens, channels] the most similar patch token of lower rank.
struct NearestTokenParams {
  int64_t batch;
  int64_t tokens;
  int64_t channels;
  int64_t num_prefix;
  Similarity similarity;

  constexpr int64_t patches() const { return tokens - num_prefix; }
};

}  // namespace tokenprune
