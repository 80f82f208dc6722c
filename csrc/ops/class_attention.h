// Argument checks of `class_attention`, for both backends.
#pragma once

#include <optional>
#include <string>

#include "class_attention_params.h"
#include "head_reduce.h"
#include "qk.h"

namespace tokenprune {

// Copies what does not lie side by side in the last dimension.
inline ClassAttentionParams check_class_attention(Tensor& q, Tensor& k,         // [B, H, N, d]
                                                  std::optional<Tensor>& v,     // [B, H, N, d]
                                                  std::optional<Tensor>& bias,  // [1 or B, 1 or H, 1, N]
                                                  double scale, const std::string& head_reduce) {
  ClassAttentionParams params{check_qk(q, k, scale), 0, 0, 0, 0, 0, 0, head_reduce_of(head_reduce)};
  const auto check = [&](const char* name, Tensor& value) {
    STD_TORCH_CHECK(value.dim() == 4, name, " must have four dimensions");
    STD_TORCH_CHECK(value.scalar_type() == q.scalar_type(), name, " must have the dtype of q");
    STD_TORCH_CHECK(value.device() == q.device(), name, " must be on the device of q");
    if (value.stride(3) != 1) value = torch::stable::contiguous(value);
  };
  if (v.has_value()) {
    check("v", *v);
    STD_TORCH_CHECK(v->size(0) == params.qk.batch && v->size(1) == params.qk.heads && v->size(2) == params.qk.tokens &&
                        v->size(3) > 0,
                    "v must have shape [B, H, N, d] to go with k");
    params.v_channels = v->size(3);
    params.v_batch_stride = v->stride(0);
    params.v_head_stride = v->stride(1);
    params.v_token_stride = v->stride(2);
  }
  if (bias.has_value()) {
    check("bias", *bias);
    const bool images = bias->size(0) == params.qk.batch;
    const bool heads = bias->size(1) == params.qk.heads;
    STD_TORCH_CHECK((images || bias->size(0) == 1) && (heads || bias->size(1) == 1) && bias->size(2) == 1 &&
                        bias->size(3) == params.qk.tokens,
                    "bias must have shape [1 or B, 1 or H, 1, N] to go with k");
    params.bias_batch_stride = images ? bias->stride(0) : 0;
    params.bias_head_stride = heads ? bias->stride(1) : 0;
  }
  return params;
}

}  // namespace tokenprune
