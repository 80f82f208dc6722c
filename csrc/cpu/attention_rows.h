// Softmax rows of q k^T, a block of queries at a time: what the operators that never store the matrix are made of.
#pragma once

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "../ops/qk_params.h"
#include "dot_tile.h"

namespace tokenprune {

constexpr int64_t kQueryBlock = 32;  // queries whose rows are formed together

// e^x for x up to about 88, in a form that the compiler vectorises: 2^(n + f) with a polynomial for 2^f on [-1/2, 1/2],
// within 2 units in the last place; 0 below 2^-126, infinity above the largest float, NaN for NaN.
inline float vector_exp(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  float power = x * 1.44269504f;
  power = power < -126.0f ? -126.0f : power;
  power = power > 128.0f ? 128.0f : power;
  const float shifted = power + kRound;
  const float whole = shifted - kRound;
  const float f = std::fma(x, 1.44269504f, -whole) + x * 1.92596299e-8f;  // log2(e) in two parts
  float y = 1.5403530e-4f;
  y = std::fma(y, f, 1.3333558e-3f);
  y = std::fma(y, f, 9.6181291e-3f);
  y = std::fma(y, f, 5.5504109e-2f);
  y = std::fma(y, f, 2.4022651e-1f);
  y = std::fma(y, f, 6.9314718e-1f);
  y = std::fma(y, f, 1.0f);
  const auto exponent = (std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound) + 127) << 23;
  y *= std::bit_cast<float>(exponent);
  return x < -87.0f ? 0.0f : y;
}
inline double vector_exp(double x) { return std::exp(x); }

// row[k] = e^(row[k] - shift); returns the sum.
template <typename acc_t>
TOKENPRUNE_MULTIVERSION acc_t exp_row(acc_t* __restrict__ row, int64_t n, acc_t shift) {
  return sum_in_parts<acc_t>(n, [&](int64_t k) { return row[k] = vector_exp(row[k] - shift); });
}

template <typename acc_t>
acc_t row_max(const acc_t* row, int64_t n) {
  acc_t found = 0;
  with_vectors([&](auto bytes) __attribute__((always_inline)) { found = largest_of<bytes()>(row, n); });
  return found;
}

// The logits of a block of queries of one head, and the buffers for them; one object a thread.
template <typename value_t, typename acc_t>
class AttentionRows {
 public:
  explicit AttentionRows(const QkParams& params)
      : params_(params),
        stride_(padded_columns<acc_t>(params.tokens)),
        queries_(kQueryBlock * params.channels),
        rows_(kQueryBlock * stride_) {}

  // Logits of the queries first .. first + count - 1 against all keys, which `panels` holds.
  void form(const value_t* q, const acc_t* panels, int64_t first, int64_t count) {
    const int64_t d = params_.channels;
    for (int64_t r = 0; r < count; ++r) {
      const value_t* from = q + (first + r) * params_.q_token_stride;
      for (int64_t c = 0; c < d; ++c) queries_[r * d + c] = static_cast<acc_t>(from[c]);
    }
    dot_block({queries_.data(), d}, count, panels, d, params_.tokens, static_cast<acc_t>(params_.scale), rows_.data(),
              stride_);
  }
  acc_t* row(int64_t r) { return rows_.data() + r * stride_; }
  int64_t stride() const { return stride_; }

  // Row r becomes e^(logit - its largest); returns the sum, and that largest logit in `shift`.
  acc_t softmax_terms(int64_t r, acc_t* shift) {
    *shift = row_max(row(r), params_.tokens);
    // All logits -infinity, or NaN: leave the subtraction to make NaN of it, as softmax does.
    return exp_row(row(r), params_.tokens, *shift);
  }

 private:
  QkParams params_;
  int64_t stride_;
  std::vector<acc_t> queries_;  // [kQueryBlock, channels]
  std::vector<acc_t> rows_;     // [kQueryBlock, stride]
};

}  // namespace tokenprune
