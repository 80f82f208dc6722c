// Weighted page rank of many matrices from queries and keys, those of which each fits the cache of a thread.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "../ops/wpr_qk_params.h"
#include "attention_matrix.h"
#include "power_iteration.h"

namespace tokenprune {

template <typename value_t, typename acc_t>
struct Matrices {
  WprQkParams params;
  const value_t* q;
  const value_t* k;
  const acc_t* start;    // or null
  const int64_t* taken;  // [batch, tokens]: the tokens that are ranked, or null
  acc_t* scores;         // [matrices, tokens]

  TokenRows<value_t> queries(int64_t m) const {
    const int64_t image = m / params.qk.heads;
    return {q + params.qk.q_offset(image, m % params.qk.heads), params.qk.q_token_stride, taken_of(image)};
  }
  TokenRows<value_t> keys(int64_t m) const {
    const int64_t image = m / params.qk.heads;
    return {k + params.qk.k_offset(image, m % params.qk.heads), params.qk.k_token_stride, taken_of(image)};
  }
  const int64_t* taken_of(int64_t image) const { return taken ? taken + image * params.qk.tokens : nullptr; }
  int64_t stride() const { return padded_columns<acc_t>(params.qk.tokens); }
  int64_t bytes_of(int64_t rows) const { return rows * stride() * static_cast<int64_t>(sizeof(acc_t)); }
};

// The matrices begin .. end - 1. One iteration takes every block of queries as it comes, more of them need the whole
// matrix.
template <typename value_t, typename acc_t>
void rank_small(const Matrices<value_t, acc_t>& work, int64_t begin, int64_t end) {
  const int64_t n = work.params.qk.tokens;
  const bool once = work.params.wpr.max_iters == 1;
  AttentionMatrix<value_t, acc_t> attention(work.params.qk);
  PowerSteps<acc_t> steps(n, attention.stride());
  std::vector<acc_t> next(n), sums(n);
  const std::unique_ptr<acc_t[]> matrix(once ? nullptr : new acc_t[n * attention.stride()]);
  const auto place = [&](int64_t first) { return once ? nullptr : matrix.get() + first * attention.stride(); };
  for (int64_t m = begin; m < end; ++m) {
    acc_t* s = work.scores + m * n;
    power_start(work.params.wpr, work.start, m, s);
    std::fill(next.begin(), next.end(), acc_t(0));
    const TokenRows<value_t> following = work.keys(std::min(m + 1, end - 1));
    attention.form(work.queries(m), work.keys(m), m + 1 < end ? &following : nullptr, sums.data(), place,
                   [&](const acc_t* terms, int64_t first, int64_t count) {
                     if (once) steps.add(terms, count, sums.data() + first, s + first, next.data());
                   });
    if (once) {
      std::copy_n(next.data(), n, s);
      continue;
    }
    power_iterate(work.params.wpr, s, next.data(), [&](const acc_t* from, acc_t* to) {
      steps.run(matrix.get(), sums.data(), from, to, [](int64_t, int64_t) {});
    });
  }
}

}  // namespace tokenprune
