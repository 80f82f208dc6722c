#include "../ops/class_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "attention_rows.h"
#include "head_reduce.h"

namespace tokenprune {
namespace {

constexpr int64_t kGrain = 48 * 1024;  // numbers a thread should have to read before another one is worth waking

// dots[t] = the sum over n channels of a[t * a_stride + c] * b[t * b_stride + c], for kTokens tokens at a time: their
// sums are independent, and so are the reads of their rows.
template <int kTokens, int kBytes, typename factor_t, typename value_t, typename acc_t>
[[gnu::always_inline]] inline void dot_tokens(const factor_t* a, int64_t a_stride, const value_t* b, int64_t b_stride,
                                              int64_t n, acc_t* dots) {
  using Vectors = VectorsOf<kBytes, acc_t>;
  constexpr int64_t kSums = Vectors::kSums;
  typename Vectors::type sums[kTokens][Vectors::kCount] = {};
  int64_t c = 0;
  for (; c + kSums <= n; c += kSums) {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < Vectors::kCount; ++v) {
        typename Vectors::type x, y;
        Vectors::load(a + t * a_stride + c + v * Vectors::kLanes, x);
        Vectors::load(b + t * b_stride + c + v * Vectors::kLanes, y);
        sums[t][v] += x * y;
      }
    }
  }
  acc_t parts[kTokens][kSums];
  std::memcpy(parts, sums, sizeof(parts));
  for (; c < n; ++c) {
    for (int t = 0; t < kTokens; ++t) {
      parts[t][c % kSums] += static_cast<acc_t>(a[t * a_stride + c]) * static_cast<acc_t>(b[t * b_stride + c]);
    }
  }
#pragma GCC unroll 8
  for (int64_t half = kSums / 2; half > 0; half /= 2) {
    for (int t = 0; t < kTokens; ++t) {
      for (int64_t i = 0; i < half; ++i) parts[t][i] += parts[t][half + i];
    }
  }
  for (int t = 0; t < kTokens; ++t) dots[t] = parts[t][0];
}

// Logits, and lengths of the values if there are any, [heads, tokens] each, of kTokens tokens.
template <int kTokens, int kBytes, typename value_t, typename acc_t>
[[gnu::always_inline]] inline void visit_tokens(const ClassAttentionParams& params, const acc_t* q, const value_t* k,
                                                const value_t* v, acc_t* logits, acc_t* lengths) {
  const QkParams& qk = params.qk;
  const acc_t scale = static_cast<acc_t>(qk.scale);
  for (int64_t h = 0; h < qk.heads; ++h) {
    acc_t dots[kTokens];
    dot_tokens<kTokens, kBytes>(q + h * qk.channels, 0, k + h * qk.k_head_stride, qk.k_token_stride, qk.channels, dots);
    for (int t = 0; t < kTokens; ++t) logits[h * qk.tokens + t] = dots[t] * scale;
    if (!v) continue;
    const value_t* values = v + h * params.v_head_stride;
    dot_tokens<kTokens, kBytes>(values, params.v_token_stride, values, params.v_token_stride, params.v_channels, dots);
    for (int t = 0; t < kTokens; ++t) lengths[h * qk.tokens + t] = std::sqrt(dots[t]);
  }
}

// The softmax of a head's row, times the lengths; `terms` has room for a padded row.
template <typename value_t, typename acc_t>
void weigh_row(const value_t* bias, const acc_t* lengths, int64_t n, acc_t* terms, acc_t* row) {
  for (int64_t i = 0; i < n; ++i) terms[i] = row[i] + (bias ? static_cast<acc_t>(bias[i]) : acc_t(0));
  acc_t largest = 0, sum = 0;
  softmax_terms(terms, 1, 0, n, &largest, terms, &sum);
  for (int64_t i = 0; i < n; ++i) row[i] = terms[i] / sum * (lengths ? lengths[i] : acc_t(1));
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

// Logits and lengths of all images, [batch, heads, tokens]; a large image is shared by several threads.
template <typename value_t, typename acc_t>
void visit_images(const ClassAttentionParams& params, const value_t* q, const value_t* k, const value_t* v,
                  acc_t* logits, acc_t* lengths) {
  const QkParams& qk = params.qk;
  const int64_t n = qk.tokens;
  const int64_t grain = std::max<int64_t>(1, kGrain / (qk.heads * (qk.channels + (v ? params.v_channels : 0))));
  torch::stable::parallel_for(0, qk.batch * n, grain, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> query(qk.heads * qk.channels);
    for (int64_t row = begin; row < end;) {  // image by image
      const int64_t image = row / n, first = row % n;
      const int64_t count = std::min(n - first, end - row);
      for (int64_t h = 0; h < qk.heads; ++h) {
        std::copy_n(q + qk.q_offset(image, h), qk.channels, query.data() + h * qk.channels);
      }
      with_vectors([&](auto bytes) __attribute__((always_inline)) {
        int64_t t = first;
        const auto visit = [&](auto tokens) __attribute__((always_inline)) {
          for (; t + tokens() <= first + count; t += tokens()) {
            visit_tokens<tokens(), bytes()>(params, query.data(), k + qk.k_offset(image, 0) + t * qk.k_token_stride,
                                            v ? v + params.v_offset(image, 0) + t * params.v_token_stride : nullptr,
                                            logits + image * qk.heads * n + t,
                                            v ? lengths + image * qk.heads * n + t : nullptr);
          }
        };
        visit(std::integral_constant<int, 4>());
        visit(std::integral_constant<int, 1>());
      });
      row += count;
    }
  });
}

template <typename value_t, typename acc_t>
void weigh_images(const ClassAttentionParams& params, const value_t* q, const value_t* k, const value_t* v,
                  const value_t* bias, acc_t* out) {
  const QkParams& qk = params.qk;
  const int64_t n = qk.tokens;
  std::vector<acc_t> logits(qk.batch * qk.heads * n);
  std::vector<acc_t> lengths(v ? logits.size() : 0);
  visit_images(params, q, k, v, logits.data(), lengths.data());
  torch::stable::parallel_for(
      0, qk.batch, std::max<int64_t>(1, kGrain / (qk.heads * n)), [&](int64_t begin, int64_t end) {
        std::vector<acc_t> terms(padded_row(n));
        for (int64_t b = begin; b < end; ++b) {
          acc_t* weights = logits.data() + b * qk.heads * n;
          for (int64_t h = 0; h < qk.heads; ++h) {
            weigh_row(bias ? bias + params.bias_offset(b, h) : nullptr,
                      v ? lengths.data() + (b * qk.heads + h) * n : nullptr, n, terms.data(), weights + h * n);
          }
          if (params.head_reduce == HeadReduce::kMax) {
            join_heads<true>(weights, qk.heads, n, acc_t(1), out + b * n);
          } else {
            const acc_t divisor = params.head_reduce == HeadReduce::kMean ? static_cast<acc_t>(qk.heads) : acc_t(1);
            join_heads<false>(weights, qk.heads, n, divisor, out + b * n);
          }
        }
      });
}

Tensor class_attention_cpu(Tensor q, Tensor k, std::optional<Tensor> v, std::optional<Tensor> bias, double scale,
                           std::string head_reduce) {
  const ClassAttentionParams params = check_class_attention(q, k, v, bias, scale, head_reduce);
  Tensor out = allocate(q, {params.qk.batch, params.qk.tokens}, accumulate_dtype(q));
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
