// The search that `nearest_token`, `bipartite_match` and `peaks_match` have in common.
#pragma once

#include <functional>

#include "../ops/nearest_token_params.h"
#include "../stable.h"

namespace tokenprune {

// The order in which an image's patch tokens are compared: the token of every place in it, and how many of the first
// places hold candidates of that token, which become no fewer from place to place; [patches] each.
using Order = std::function<void(int64_t image, int32_t* tokens, int32_t* columns)>;

// What the search found for one image.
struct Found {
  const int32_t* tokens;     // [patches]: the token of every place
  const void* rows;          // [patches, stride]: similarities of every place, to its candidates; null if not kept
  int64_t stride;            // of the rows
  const void* similarity;    // [tokens]: the largest of every token; -1: it has no candidate
  const int64_t* candidate;  // [tokens]: whom that is with; -1: nobody
};

// Called after every image; by several threads at once.
using Finish = std::function<void(int64_t image, const Found& found)>;

// Similarities are in the dtype of sums. Arguments are checked.
void search_nearest(const NearestTokenParams& params,
                    const Tensor& metric,  // as `params` describe it
                    const Order& order, bool keep_rows, const Finish& finish);

}  // namespace tokenprune
