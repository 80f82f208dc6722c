#pragma once

#include <cstdint>

#include "nearest_token_params.h"
#include "topk_gather_params.h"

namespace tokenprune {

enum class Partition { kAlternate, kUnimportant, kImportant };

// The `pairs` most similar pairs of a token of group A and one of group B; the groups are halves of the patch tokens.
struct BipartiteMatchParams {
  NearestTokenParams nearest;
  int64_t pairs;
  Partition partition;

  constexpr int64_t group_a() const { return (nearest.patches() + 1) / 2; }
  constexpr int64_t largest_pairs() const { return nearest.patches() < 2 ? 0 : group_a(); }
  constexpr int64_t kept() const { return nearest.patches() - pairs; }

  // The partitions by importance: tokens in the more important half, and the group (0: B, 1: A) it becomes.
  constexpr int64_t important() const {
    return partition == Partition::kImportant ? group_a() : nearest.patches() - group_a();
  }
  constexpr int64_t important_group() const { return partition == Partition::kImportant ? 1 : 0; }

  // The selection of the best `count` patch tokens.
  constexpr TopkGatherParams best(int64_t count) const {
    return {nearest.batch, nearest.tokens, 0, nearest.num_prefix, count, Fuse::kNone};
  }
};

}  // namespace tokenprune
