// The sum over queries, for rows of attention whose heads have been reduced.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../ops/attn_colsum_params.h"
#include "simd.h"

namespace tokenprune {

// out[k] = the sum of `count` rows, `stride` apart.
template <typename acc_t>
TOKENPRUNE_MULTIVERSION void add_rows(const acc_t* __restrict__ rows, int64_t count, int64_t stride, int64_t n,
                                      acc_t* __restrict__ out) {
  for (int64_t k = 0; k < n; ++k) out[k] = rows[k];
  for (int64_t r = 1; r < count; ++r) {
    for (int64_t k = 0; k < n; ++k) out[k] += rows[r * stride + k];
  }
}

// out[k] of one image: the sums of its blocks of queries, added in order; 0 for the prefix.
template <typename acc_t>
void total_of_blocks(const AttnColsumParams& params, const acc_t* partial,  // [blocks, tokens]
                     int64_t blocks, acc_t* out) {                          // [tokens]
  const int64_t n = params.tokens;
  const acc_t scale = params.head_reduce == HeadReduce::kMean ? static_cast<acc_t>(params.heads) : acc_t(1);
  std::fill_n(out, n, acc_t(0));
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t k = params.num_prefix; k < n; ++k) out[k] += partial[block * n + k];
  }
  for (int64_t k = params.num_prefix; k < n; ++k) out[k] /= scale;
}

}  // namespace tokenprune
