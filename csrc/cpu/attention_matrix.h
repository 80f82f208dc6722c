// The attention matrix of one head, formed by one thread, in whose cache it fits.
#pragma once

#include <algorithm>
#include <vector>

#include "attention_rows.h"
#include "power_iteration.h"

namespace tokenprune {

constexpr int64_t kThreadBytes = 2 << 20;  // the largest matrix that a thread has to itself

// Queries and keys of a head lie a page apart from token to token, which no processor foresees.
template <typename value_t>
void prefetch(const TokenRows<value_t>& rows, int64_t first, int64_t count, int64_t channels) {
  for (int64_t r = first; r < first + count; ++r) {
    const value_t* row = rows[r];
    for (int64_t c = 0; c < channels; c += 64 / static_cast<int64_t>(sizeof(value_t))) __builtin_prefetch(row + c);
  }
}

// Steps of page rank on a matrix of terms, each row of which has a sum: of its probabilities, times that sum. A step
// divides the scores that rows are multiplied with.
template <typename acc_t>
class PowerSteps {
 public:
  PowerSteps(int64_t tokens, int64_t stride)
      : tokens_(tokens), stride_(stride), partial_(tokens), weights_(kQueryBlock) {}

  // to += A^T from, for `count` rows of A.
  void add(const acc_t* terms, int64_t count, const acc_t* sums, const acc_t* from, acc_t* to) {
    for (int64_t r = 0; r < count; ++r) weights_[r] = from[r] / sums[r];
    power_step(terms, stride_, weights_.data(), count, partial_.data(), tokens_);
    add_scaled(acc_t(1), partial_.data(), tokens_, to);
  }

  // to = A^T from, in the blocks in which matrices are formed; before each, prepare(first row, rows).
  template <typename Prepare>
  void run(const acc_t* matrix, const acc_t* sums, const acc_t* from, acc_t* to, const Prepare& prepare) {
    std::fill_n(to, tokens_, acc_t(0));
    for (int64_t first = 0; first < tokens_; first += kQueryBlock) {
      const int64_t count = std::min(kQueryBlock, tokens_ - first);
      prepare(first, count);
      add(matrix + first * stride_, count, sums + first, from + first, to);
    }
  }

 private:
  int64_t tokens_;
  int64_t stride_;
  std::vector<acc_t> partial_;  // [tokens]
  std::vector<acc_t> weights_;  // [kQueryBlock]
};

// Forms matrices of terms, each with the largest logit of its row as 1.
template <typename value_t, typename acc_t>
class AttentionMatrix {
 public:
  explicit AttentionMatrix(const QkParams& params)
      : params_(params), rows_(params), panels_(rows_.stride() * params.channels) {}

  int64_t stride() const { return rows_.stride(); }

  // A block of queries at a time: its terms go to place(first query), or, when that is null, to where the next block
  // replaces them; then comes block(terms, first, count). sums[q] is the sum of row q. The keys of the next matrix are
  // fetched beside.
  template <typename Place, typename Block>
  void form(const TokenRows<value_t>& queries, const TokenRows<value_t>& keys, const TokenRows<value_t>* next_keys,
            acc_t* sums, const Place& place, const Block& block) {
    const int64_t n = params_.tokens, d = params_.channels;
    acc_t shifts[kQueryBlock];
    pack_columns(keys, n, d, panels_.data());
    for (int64_t first = 0; first < n; first += kQueryBlock) {
      const int64_t count = std::min(kQueryBlock, n - first);
      prefetch(queries, first + count, std::min(kQueryBlock, n - first - count), d);
      rows_.form(queries, panels_.data(), first, count);
      if (next_keys) prefetch(*next_keys, first, count, d);
      acc_t* placed = place(first);
      acc_t* terms = placed ? placed : rows_.row(0);
      softmax_terms(rows_.row(0), count, stride(), n, shifts, terms, sums + first);
      block(terms, first, count);
    }
  }

 private:
  QkParams params_;
  AttentionRows<value_t, acc_t> rows_;
  std::vector<acc_t> panels_;  // the keys
};

}  // namespace tokenprune
