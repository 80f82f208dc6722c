#pragma once

#include "qk_params.h"
#include "wpr_params.h"

namespace tokenprune {

// The iteration `wpr` over A = softmax(scale * q k^T) of `qk`.
struct WprQkParams {
  QkParams qk;
  WprParams wpr;
};

}  // namespace tokenprune
