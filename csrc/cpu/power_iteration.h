// Weighted page rank of one matrix in memory, s <- A^T s.
#pragma once

#include <algorithm>
#include <cmath>

#include "../ops/wpr_params.h"
#include "simd.h"

namespace tokenprune {

// One step out = A^T s for `rows` rows of n numbers, `stride` apart. Eight rows of A pass through each visit of `out`,
// which stays in the first-level cache: one of each eighth of A, so that memory is read in eight long streams.
template <typename value_t, typename acc_t>
TOKENPRUNE_MULTIVERSION void power_step(const value_t* __restrict__ attn, int64_t stride,
                                        const acc_t* __restrict__ s,  // [rows]
                                        int64_t rows,
                                        acc_t* __restrict__ out,  // [n]
                                        int64_t n) {
  constexpr int64_t kStreams = 8;
  const int64_t part = rows / kStreams;
  const int64_t apart = part * stride;
  for (int64_t k = 0; k < n; ++k) out[k] = 0;
  for (int64_t q = 0; q < part; ++q) {
    const value_t* a = attn + q * stride;
    const acc_t* w = s + q;
    for (int64_t k = 0; k < n; ++k) {
      const acc_t low = w[0] * static_cast<acc_t>(a[k]) + w[part] * static_cast<acc_t>(a[k + apart]) +
                        w[2 * part] * static_cast<acc_t>(a[k + 2 * apart]) +
                        w[3 * part] * static_cast<acc_t>(a[k + 3 * apart]);
      const acc_t high =
          w[4 * part] * static_cast<acc_t>(a[k + 4 * apart]) + w[5 * part] * static_cast<acc_t>(a[k + 5 * apart]) +
          w[6 * part] * static_cast<acc_t>(a[k + 6 * apart]) + w[7 * part] * static_cast<acc_t>(a[k + 7 * apart]);
      out[k] += low + high;
    }
  }
  for (int64_t q = kStreams * part; q < rows; ++q) {
    for (int64_t k = 0; k < n; ++k) out[k] += s[q] * static_cast<acc_t>(attn[q * stride + k]);
  }
}

// The sum of all |a[k] - b[k]|.
template <typename acc_t>
TOKENPRUNE_MULTIVERSION acc_t distance(const acc_t* a, const acc_t* b, int64_t n) {
  return sum_in_parts<acc_t>(n, [&](int64_t k) { return std::abs(a[k] - b[k]); });
}

// The first scores of matrix m: ones when there is no start.
template <typename acc_t>
void power_start(const WprParams& params, const acc_t* start, int64_t m, acc_t* s) {
  if (start) {
    std::copy_n(start + m * params.start_stride, params.tokens, s);
  } else {
    std::fill_n(s, params.tokens, acc_t(1));
  }
}

// Iterates `step(s, next)` until it converges; the result ends in `s`.
template <typename acc_t, typename Step>
void power_iterate(const WprParams& params, acc_t* s, acc_t* next, const Step& step) {
  const int64_t n = params.tokens;
  for (int64_t iteration = 0; iteration < params.max_iters; ++iteration) {
    step(s, next);
    const acc_t change = distance(next, s, n);
    std::copy_n(next, n, s);
    if (change <= static_cast<acc_t>(params.threshold)) break;
  }
}

}  // namespace tokenprune
