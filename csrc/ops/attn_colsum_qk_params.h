#pragma once

#include "attn_colsum_params.h"
#include "qk_params.h"

namespace tokenprune {

// The sum of `colsum` over A = softmax(scale * q k^T) of `qk`.
struct AttnColsumQkParams {
  QkParams qk;
  AttnColsumParams colsum;
};

}  // namespace tokenprune
