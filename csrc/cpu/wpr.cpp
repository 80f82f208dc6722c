#include "../ops/wpr.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "simd.h"

namespace tokenprune {
namespace {

// One step out = A^T s. Eight rows of A pass through each visit of `out`, which stays in the first-level cache.
template <typename value_t, typename acc_t>
TOKENPRUNE_MULTIVERSION void step(const value_t* __restrict__ attn,  // [n, n]
                                  const acc_t* __restrict__ s,       // [n]
                                  int64_t n,
                                  acc_t* __restrict__ out) {  // [n]
  constexpr int64_t kRows = 8;
  for (int64_t k = 0; k < n; ++k) out[k] = 0;
  int64_t q = 0;
  for (; q + kRows <= n; q += kRows) {
    const value_t* a = attn + q * n;
    const acc_t* w = s + q;
    for (int64_t k = 0; k < n; ++k) {
      const acc_t low = w[0] * static_cast<acc_t>(a[k]) + w[1] * static_cast<acc_t>(a[k + n]) +
                        w[2] * static_cast<acc_t>(a[k + 2 * n]) + w[3] * static_cast<acc_t>(a[k + 3 * n]);
      const acc_t high = w[4] * static_cast<acc_t>(a[k + 4 * n]) + w[5] * static_cast<acc_t>(a[k + 5 * n]) +
                         w[6] * static_cast<acc_t>(a[k + 6 * n]) + w[7] * static_cast<acc_t>(a[k + 7 * n]);
      out[k] += low + high;
    }
  }
  for (; q < n; ++q) {
    for (int64_t k = 0; k < n; ++k) out[k] += s[q] * static_cast<acc_t>(attn[q * n + k]);
  }
}

// All iterations of one matrix; the result ends in `s`.
template <typename value_t, typename acc_t>
void iterate(const WprParams& params, const value_t* attn, acc_t* s, acc_t* next) {
  const int64_t n = params.tokens;
  for (int64_t iteration = 0; iteration < params.max_iters; ++iteration) {
    step(attn, s, n, next);
    acc_t change = 0;
    for (int64_t k = 0; k < n; ++k) change += std::abs(next[k] - s[k]);
    std::copy_n(next, n, s);
    if (change <= static_cast<acc_t>(params.threshold)) break;
  }
}

Tensor wpr_cpu(Tensor attn, std::optional<Tensor> start, int64_t max_iters, double tol) {
  const WprParams params = check_wpr(attn, start, max_iters, tol);
  attn = torch::stable::contiguous(attn);
  if (start.has_value()) start = torch::stable::contiguous(*start);
  const auto dtype = accumulate_dtype(attn);
  Tensor out = torch::stable::new_empty(attn, {attn.size(0), attn.size(1), attn.size(2)}, dtype);
  Tensor scratch = torch::stable::new_empty(attn, {params.matrices, params.tokens}, dtype);
  TOKENPRUNE_DISPATCH(attn.scalar_type(), "wpr", [&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto* a = vector_ptr<scalar_t>(attn);
    const acc_t* first = start.has_value() ? data_ptr<acc_t>(*start) : nullptr;
    acc_t* scores = data_ptr<acc_t>(out);
    acc_t* next = data_ptr<acc_t>(scratch);
    const int64_t n = params.tokens;
    torch::stable::parallel_for(0, params.matrices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        if (first) {
          std::copy_n(first + m * params.start_stride, n, scores + m * n);
        } else {
          std::fill_n(scores + m * n, n, acc_t(1));
        }
        iterate(params, a + m * n * n, scores + m * n, next + m * n);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("wpr", TORCH_BOX(&tokenprune::wpr_cpu)); }
