#pragma once

#include <cstdint>

#include "head_reduce_params.h"
#include "qk_params.h"

namespace tokenprune {

// Attention of token 0 to all, times the lengths of v [batch, heads, tokens, v_channels] if there is one, reduced over
// the heads. The channels of a token lie side by side, and so do the biases of a row; a stride of 0 repeats.
struct ClassAttentionParams {
  QkParams qk;
  int64_t v_channels;
  int64_t v_batch_stride, v_head_stride, v_token_stride;
  int64_t bias_batch_stride, bias_head_stride;
  HeadReduce head_reduce;

  constexpr int64_t v_offset(int64_t image, int64_t head) const {
    return image * v_batch_stride + head * v_head_stride;
  }
  constexpr int64_t bias_offset(int64_t image, int64_t head) const {
    return image * bias_batch_stride + head * bias_head_stride;
  }
};

}  // namespace tokenprune
