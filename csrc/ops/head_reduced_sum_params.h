#pragma once

#include <cstdint>

#include "head_reduce_params.h"

namespace tokenprune {

// Sum over the channels of the reduction over heads of features [batch, heads, tokens, channels]; the channels of a
// token lie side by side, the other strides are free.
struct HeadReducedSumParams {
  int64_t batch;
  int64_t heads;
  int64_t tokens;
  int64_t channels;
  int64_t batch_stride, head_stride, token_stride;
  HeadReduce head_reduce;

  // What sums are divided by.
  constexpr int64_t divisor() const { return head_reduce == HeadReduce::kMean ? heads : 1; }
};

}  // namespace tokenprune
