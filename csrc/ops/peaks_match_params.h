#pragma once

#include "nearest_token_params.h"
#include "topk_gather_params.h"

namespace tokenprune {

// Keep the `keep` patch tokens with the highest importance^exponent * (1 - similarity to a more important one), and
// match the others with the most similar of them.
struct PeaksMatchParams {
  NearestTokenParams nearest;
  int64_t keep;
  double exponent;

  constexpr int64_t dropped() const { return nearest.patches() - keep; }
  constexpr TopkGatherParams best() const {
    return {nearest.batch, nearest.tokens, 0, nearest.num_prefix, keep, Fuse::kNone};
  }
};

}  // namespace tokenprune
