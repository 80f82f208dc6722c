#pragma once

#include <cstdint>

namespace tokenprune {

// Scores [batch, heads, tokens]: drop the heads whose variance over the patch tokens is outside [vmin, vmax], then the
// root mean square over the heads left.
struct HeadAggregateParams {
  int64_t batch;
  int64_t heads;
  int64_t tokens;
  int64_t num_prefix;
  double vmin;
  double vmax;
};

}  // namespace tokenprune
