#pragma once

#include <cstdint>

namespace tokenprune {

// For every patch token of metric [batch, tokens, channels] the most similar patch token of lower rank.
struct NearestTokenParams {
  int64_t batch;
  int64_t tokens;
  int64_t channels;
  int64_t num_prefix;

  constexpr int64_t patches() const { return tokens - num_prefix; }
};

// Shorter vectors are divided by this instead of their norm.
constexpr double kMinNorm = 1e-12;

}  // namespace tokenprune
