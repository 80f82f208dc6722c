#include "../ops/class_attention.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "attention_rows.h"
#include "head_reduce.h"

namespace tokenprune {
namespace {

constexpr int64_t kAhead = 2;  // tokens

// The sum of term(0) .. term(n - 1), in parts that are added by halves.
template <typename acc_t, typename Term>
[[gnu::always_inline]] inline acc_t sum_by_halves(int64_t n, const Term& term) {
  constexpr int64_t kParts = 16;
  acc_t parts[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= n; i += kParts) {
    for (int64_t j = 0; j < kParts; ++j) parts[j] += term(i + j);
  }
  for (int64_t j = 0; i + j < n; ++j) parts[j] += term(i + j);
#pragma GCC unroll 8
  for (int64_t half = kParts / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) parts[j] += parts[half + j];
  }
  return parts[0];
}

// The rows of all heads of a token, which lie in another page than those of the one before, on their way to the cache.
template <typename value_t>
[[gnu::always_inline]] inline void prefetch(const value_t* rows, int64_t heads, int64_t head_stride, int64_t channels) {
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t c = 0; c < channels; c += 64 / static_cast<int64_t>(sizeof(value_t))) {
      __builtin_prefetch(rows + h * head_stride + c);
    }
  }
}

// Logits, and lengths of the values if there are any, [heads, tokens] each: token after token, as an image lies in
// memory.
template <typename value_t, typename acc_t>
TOKENPRUNE_MULTIVERSION void visit_tokens(const ClassAttentionParams& params, const acc_t* __restrict__ q,
                                          const value_t* __restrict__ k, const value_t* __restrict__ v,
                                          acc_t* __restrict__ logits, acc_t* __restrict__ lengths) {
  const QkParams& qk = params.qk;
  const acc_t scale = static_cast<acc_t>(qk.scale);
  for (int64_t n = 0; n < qk.tokens; ++n, k += qk.k_token_stride) {
    if (n + kAhead < qk.tokens) {
      prefetch(k + kAhead * qk.k_token_stride, qk.heads, qk.k_head_stride, qk.channels);
      if (v) prefetch(v + (n + kAhead) * params.v_token_stride, qk.heads, params.v_head_stride, params.v_channels);
    }
    for (int64_t h = 0; h < qk.heads; ++h) {
      const acc_t* query = q + h * qk.channels;
      const value_t* key = k + h * qk.k_head_stride;
      const auto product = [&](int64_t c) { return query[c] * static_cast<acc_t>(key[c]); };
      logits[h * qk.tokens + n] = sum_by_halves<acc_t>(qk.channels, product) * scale;
    }
    if (!v) continue;
    for (int64_t h = 0; h < qk.heads; ++h) {
      const value_t* value = v + h * params.v_head_stride + n * params.v_token_stride;
      const auto square = [&](int64_t c) { return static_cast<acc_t>(value[c]) * static_cast<acc_t>(value[c]); };
      lengths[h * qk.tokens + n] = std::sqrt(sum_by_halves<acc_t>(params.v_channels, square));
    }
  }
}

// The softmax of a head's row, times the lengths.
template <typename value_t, typename acc_t>
void weigh_row(const value_t* bias, const acc_t* lengths, int64_t n, acc_t* row) {
  if (bias) {
    for (int64_t i = 0; i < n; ++i) row[i] += static_cast<acc_t>(bias[i]);
  }
  const acc_t sum = exp_row(row, n, row_max(row, n));
  for (int64_t i = 0; i < n; ++i) row[i] = row[i] / sum * (lengths ? lengths[i] : acc_t(1));
}

template <bool kMax, typename acc_t>
TOKENPRUNE_MULTIVERSION void join_heads(const acc_t* __restrict__ weights, int64_t heads, int64_t n, acc_t divisor,
                                        acc_t* __restrict__ out) {
  using Reduction = HeadReduction<kMax, acc_t>;
  std::fill_n(out, n, Reduction::kNothing);
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < n; ++i) out[i] = Reduction::join(out[i], weights[h * n + i]);
  }
  for (int64_t i = 0; i < n; ++i) out[i] /= divisor;
}

template <typename value_t, typename acc_t>
void weigh_images(const ClassAttentionParams& params, const value_t* q, const value_t* k, const value_t* v,
                  const value_t* bias, acc_t* out) {
  const QkParams& qk = params.qk;
  torch::stable::parallel_for(0, qk.batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> query(qk.heads * qk.channels);
    std::vector<acc_t> weights(qk.heads * qk.tokens);
    std::vector<acc_t> lengths(v ? qk.heads * qk.tokens : 0);
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t h = 0; h < qk.heads; ++h) {
        std::copy_n(q + qk.q_offset(b, h), qk.channels, query.data() + h * qk.channels);
      }
      visit_tokens(params, query.data(), k + qk.k_offset(b, 0), v ? v + params.v_offset(b, 0) : nullptr, weights.data(),
                   lengths.data());
      for (int64_t h = 0; h < qk.heads; ++h) {
        weigh_row(bias ? bias + params.bias_offset(b, h) : nullptr, v ? lengths.data() + h * qk.tokens : nullptr,
                  qk.tokens, weights.data() + h * qk.tokens);
      }
      acc_t* to = out + b * qk.tokens;
      if (params.head_reduce == HeadReduce::kMax) {
        join_heads<true>(weights.data(), qk.heads, qk.tokens, acc_t(1), to);
      } else {
        const acc_t divisor = params.head_reduce == HeadReduce::kMean ? static_cast<acc_t>(qk.heads) : acc_t(1);
        join_heads<false>(weights.data(), qk.heads, qk.tokens, divisor, to);
      }
    }
  });
}

Tensor class_attention_cpu(Tensor q, Tensor k, std::optional<Tensor> v, std::optional<Tensor> bias, double scale,
                           std::string head_reduce) {
  const ClassAttentionParams params = check_class_attention(q, k, v, bias, scale, head_reduce);
  Tensor out = torch::stable::new_empty(q, {params.qk.batch, params.qk.tokens}, accumulate_dtype(q));
  TOKENPRUNE_DISPATCH(q.scalar_type(), "class_attention", [&] {
    weigh_images(params, vector_ptr<scalar_t>(q), vector_ptr<scalar_t>(k),
                 v.has_value() ? vector_ptr<scalar_t>(*v) : nullptr,
                 bias.has_value() ? vector_ptr<scalar_t>(*bias) : nullptr, data_ptr<accumulate_t<scalar_t>>(out));
  });
  return out;
}

}  // namespace
}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  m.impl("class_attention", TORCH_BOX(&tokenprune::class_attention_cpu));
}
