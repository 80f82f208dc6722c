#pragma once

#include <cstdint>

namespace tokenprune {

enum class Fuse { kNone, kMean, kWeighted };

// Keep the `keep` best of the patch tokens of x [batch, tokens, channels]; fuse the others into one, or drop them.
struct TopkGatherParams {
  int64_t batch;
  int64_t tokens;
  int64_t channels;
  int64_t num_prefix;
  int64_t keep;
  Fuse fuse;

  constexpr int64_t dropped() const { return tokens - num_prefix - keep; }
  constexpr bool has_fused() const { return fuse != Fuse::kNone && dropped() > 0; }
  constexpr int64_t tokens_out() const { return num_prefix + keep + (has_fused() ? 1 : 0); }
};

}  // namespace tokenprune
