#pragma once

#include <cstdint>

#include "head_reduce_params.h"

namespace tokenprune {

// Sum over the query rows [row_begin, row_end) of the reduction over heads of A [batch, heads, tokens, tokens].
struct AttnColsumParams {
  int64_t batch;
  int64_t heads;
  int64_t tokens;
  int64_t row_begin;
  int64_t row_end;
  int64_t num_prefix;  // columns below it become 0
  HeadReduce head_reduce;
};

}  // namespace tokenprune
