#pragma once

#include <cstdint>

namespace tokenprune {

// Queries and keys [batch, heads, tokens, channels]; the channels of a token lie side by side, the other strides are
// free.
struct QkParams {
  int64_t batch;
  int64_t heads;
  int64_t tokens;
  int64_t channels;
  int64_t q_batch_stride, q_head_stride, q_token_stride;
  int64_t k_batch_stride, k_head_stride, k_token_stride;
  double scale;  // of the logits

  constexpr int64_t q_offset(int64_t image, int64_t head) const {
    return image * q_batch_stride + head * q_head_stride;
  }
  constexpr int64_t k_offset(int64_t image, int64_t head) const {
    return image * k_batch_stride + head * k_head_stride;
  }
};

}  // namespace tokenprune
