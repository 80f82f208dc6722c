#pragma once

#include <cstdint>

namespace tokenprune {

// Of x [batch, tokens, channels], the prefix and the `keep` kept tokens stay; each of `dropped` others is averaged into
// a kept one.
struct MergeTokensParams {
  int64_t batch;
  int64_t tokens;
  int64_t channels;
  int64_t num_prefix;
  int64_t keep;
  int64_t dropped;

  constexpr int64_t tokens_out() const { return num_prefix + keep; }
};

}  // namespace tokenprune
