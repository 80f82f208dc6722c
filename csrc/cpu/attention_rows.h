// Softmax rows of q k^T, a block of queries at a time: what the operators that never store the matrix are made of.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "../ops/qk_params.h"
#include "dot_tile.h"

namespace tokenprune {

constexpr int64_t kQueryBlock = 32;  // queries whose rows are formed together

// x becomes e^x in every lane: 2^n e^r, with a polynomial for e^r on [-ln(2) / 2, ln(2) / 2]. In float32 within one
// unit in the last place, 0 where n would be -127, as it is at kLowest, and infinity where it would be 128, as at
// kHighest; NaN for NaN.
constexpr float kLowest = -88.0f;
constexpr float kHighest = 89.0f;

template <typename vector_t>
[[gnu::always_inline]] inline void vector_exp(vector_t& x, const vector_t& lowest, const vector_t& highest) {
  using lane_t = std::remove_cvref_t<decltype(x[0])>;
  if constexpr (sizeof(lane_t) == 8) {
    for (size_t l = 0; l < sizeof(vector_t) / sizeof(lane_t); ++l) x[l] = std::exp(x[l]);
  } else {
    using bits_t = decltype(x < x);
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    Larger::join(x, lowest);
    Lower::join(x, highest);
    const vector_t shifted = x * 1.44269504f + kRound;
    const vector_t n = shifted - kRound;
    const vector_t r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts, the first product exact
    vector_t y = r * 1.38145404e-3f + 8.36874514e-3f;
    y = y * r + 4.16683908e-2f;
    y = y * r + 1.66665204e-1f;
    y = y * r + 4.99999934e-1f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    constexpr int32_t kBias = 127 - std::bit_cast<int32_t>(kRound);  // only its low bits are left
    x = y * reinterpret_cast<vector_t>((reinterpret_cast<bits_t>(shifted) + kBias) << 23);
  }
}

// terms[k] = e^(row[k] - shift) of the n numbers of a row, which may be the same place; returns their sum. Both have
// room for a multiple of kRowLanes: minus infinity is written behind a row, and zeros behind the terms.
constexpr int64_t kRowLanes = 16;
constexpr int64_t padded_row(int64_t n) { return (n + kRowLanes - 1) / kRowLanes * kRowLanes; }

template <int kBytes, typename acc_t>
[[gnu::always_inline]] inline acc_t exp_in_vectors(const acc_t* row, int64_t width, acc_t shift, acc_t* terms) {
  using Vectors = VectorsOf<kBytes, acc_t>;
  acc_t least = kLowest, most = kHighest;
  asm("" : "+m"(least), "+m"(most));  // with constants, GCC compares and selects in two instructions each
  const auto lowest = typename Vectors::type{} + least, highest = typename Vectors::type{} + most;
  typename Vectors::type sum = {};
  for (int64_t k = 0; k < width; k += Vectors::kLanes) {
    typename Vectors::type term;
    Vectors::load(row + k, term);
    term -= shift;
    vector_exp(term, lowest, highest);
    *reinterpret_cast<typename Vectors::type*>(terms + k) = term;
    sum += term;
  }
  return join_lanes<Sum>(sum);
}

template <typename acc_t>
void pad_row(acc_t* row, int64_t n) {
  std::fill(row + n, row + padded_row(n), -std::numeric_limits<acc_t>::infinity());
}

template <typename acc_t>
acc_t exp_row(acc_t* row, int64_t n, acc_t shift, acc_t* terms) {
  pad_row(row, n);
  acc_t sum = 0;
  with_vectors([&](auto bytes)
                   __attribute__((always_inline)) { sum = exp_in_vectors<bytes()>(row, padded_row(n), shift, terms); });
  return sum;
}

// The same for `count` rows, `stride` apart as their terms are, each with its largest number as shift. All of those
// come first, so that no row's terms wait for its own. Where all are minus infinity or NaN, the subtraction makes NaN
// of them, as softmax does.
template <typename acc_t>
void softmax_terms(acc_t* rows, int64_t count, int64_t stride, int64_t n, acc_t* shifts, acc_t* terms, acc_t* sums) {
  for (int64_t r = 0; r < count; ++r) pad_row(rows + r * stride, n);
  with_vectors([&](auto bytes) __attribute__((always_inline)) {
    const int64_t width = padded_row(n);
    for (int64_t r = 0; r < count; ++r) shifts[r] = largest_of<bytes()>(rows + r * stride, width);
    for (int64_t r = 0; r < count; ++r) {
      sums[r] = exp_in_vectors<bytes()>(rows + r * stride, width, shifts[r], terms + r * stride);
    }
  });
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
  void form(const TokenRows<value_t>& q, const acc_t* panels, int64_t first, int64_t count) {
    const int64_t d = params_.channels;
    for (int64_t r = 0; r < count; ++r) std::copy_n(q[first + r], d, queries_.data() + r * d);
    dot_block({queries_.data(), d}, count, panels, d, params_.tokens, static_cast<acc_t>(params_.scale), rows_.data(),
              stride_);
  }
  acc_t* row(int64_t r) { return rows_.data() + r * stride_; }
  int64_t stride() const { return stride_; }

 private:
  QkParams params_;
  int64_t stride_;
  std::vector<acc_t> queries_;  // [kQueryBlock, channels]
  std::vector<acc_t> rows_;     // [kQueryBlock, stride]
};

}  // namespace tokenprune
