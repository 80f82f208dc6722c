#include "../ops/attn_colsum_qk.h"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "attention_rows.h"
#include "column_sums.h"
#include "head_reduce.h"

namespace tokenprune {
namespace {

constexpr int64_t kTasks = 16;             // a small image is divided into as many, for the threads to share
constexpr int64_t kPanelBytes = 16 << 20;  // packed keys held at a time; those of one image in any case

// reduced[k] = row[k] * factor joined by the reduction over heads; the first head starts it. NaN propagates.
template <typename acc_t>
TOKENPRUNE_MULTIVERSION void join_head(const acc_t* __restrict__ row, int64_t n, acc_t factor, bool max, bool first,
                                       acc_t* __restrict__ reduced) {
  if (first) {
    for (int64_t k = 0; k < n; ++k) reduced[k] = row[k] * factor;
  } else if (max) {
    for (int64_t k = 0; k < n; ++k) reduced[k] = max_nan(reduced[k], row[k] * factor);
  } else {
    for (int64_t k = 0; k < n; ++k) reduced[k] += row[k] * factor;
  }
}

// One call's work on a group of images: keys are packed, blocks of queries are summed, their sums are added in order.
template <typename value_t, typename acc_t>
class ColumnSums {
 public:
  ColumnSums(const AttnColsumQkParams& params, const value_t* q, const value_t* k, const acc_t* lse, acc_t* out)
      : qk_(params.qk),
        colsum_(params.colsum),
        q_(q),
        k_(k),
        lse_(lse),
        out_(out),
        panel_(padded_columns<acc_t>(qk_.tokens) * qk_.channels),
        block_(std::clamp<int64_t>((colsum_.row_end - colsum_.row_begin) / kTasks / 8 * 8, 8, kQueryBlock)),
        blocks_((colsum_.row_end - colsum_.row_begin + block_ - 1) / block_),
        group_(std::clamp<int64_t>(kPanelBytes / (qk_.heads * panel_ * static_cast<int64_t>(sizeof(acc_t))), 1,
                                   std::max<int64_t>(qk_.batch, 1))),
        panels_(group_ * qk_.heads * panel_),
        partial_(group_ * blocks_ * qk_.tokens) {}

  void run() {
    for (int64_t first = 0; first < qk_.batch; first += group_) {
      const int64_t images = std::min(group_, qk_.batch - first);
      pack(first, images);
      sum_blocks(first, images);
      total(first, images);
    }
  }

 private:
  void pack(int64_t first, int64_t images) {
    torch::stable::parallel_for(0, images * qk_.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const value_t* keys = k_ + qk_.k_offset(first + m / qk_.heads, m % qk_.heads);
        pack_columns(TokenRows{keys, qk_.k_token_stride}, qk_.tokens, qk_.channels, panels_.data() + m * panel_);
      }
    });
  }

  void sum_blocks(int64_t first, int64_t images) {
    torch::stable::parallel_for(0, images * blocks_, 1, [&](int64_t begin, int64_t end) {
      AttentionRows<value_t, acc_t> rows(qk_);
      std::vector<acc_t> reduced(block_ * rows.stride());
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / blocks_;
        const int64_t row = colsum_.row_begin + task % blocks_ * block_;
        const int64_t count = std::min(block_, colsum_.row_end - row);
        for (int64_t h = 0; h < qk_.heads; ++h) join(rows, first + image, image, h, row, count, reduced.data());
        add_rows(reduced.data(), count, rows.stride(), qk_.tokens, partial_.data() + task * qk_.tokens);
      }
    });
  }

  void join(AttentionRows<value_t, acc_t>& rows, int64_t image, int64_t slot, int64_t h, int64_t first, int64_t count,
            acc_t* reduced) {
    const int64_t n = qk_.tokens;
    rows.form({q_ + qk_.q_offset(image, h), qk_.q_token_stride}, panels_.data() + (slot * qk_.heads + h) * panel_,
              first, count);
    acc_t shifts[kQueryBlock], sums[kQueryBlock];
    if (!lse_) softmax_terms(rows.row(0), count, rows.stride(), n, shifts, rows.row(0), sums);
    for (int64_t r = 0; r < count; ++r) {
      if (lse_) exp_row(rows.row(r), n, lse_[(image * qk_.heads + h) * n + first + r], rows.row(r));
      const acc_t factor = lse_ ? acc_t(1) : acc_t(1) / sums[r];
      join_head(rows.row(r), n, factor, colsum_.head_reduce == HeadReduce::kMax, h == 0, reduced + r * rows.stride());
    }
  }

  void total(int64_t first, int64_t images) {
    for (int64_t image = 0; image < images; ++image) {
      total_of_blocks(colsum_, partial_.data() + image * blocks_ * qk_.tokens, blocks_,
                      out_ + (first + image) * qk_.tokens);
    }
  }

  QkParams qk_;
  AttnColsumParams colsum_;
  const value_t* q_;
  const value_t* k_;
  const acc_t* lse_;  // [batch, heads, tokens], or null
  acc_t* out_;        // [batch, tokens]
  int64_t panel_;     // numbers in the packed keys of one head
  int64_t block_;     // queries whose rows are formed together, a multiple of eight
  int64_t blocks_;    // of them, in an image
  int64_t group_;     // images at a time
  std::vector<acc_t> panels_;
  std::vector<acc_t> partial_;  // [group, blocks, tokens]
};

Tensor attn_colsum_qk_cpu(Tensor q, Tensor k, double scale, std::string head_reduce, std::string query_rows,
                          int64_t num_prefix, std::optional<Tensor> lse, bool) {
  const AttnColsumQkParams params = check_attn_colsum_qk(q, k, scale, head_reduce, query_rows, num_prefix, lse);
  Tensor out = allocate(q, {params.qk.batch, params.qk.tokens}, accumulate_dtype(q));
  TOKENPRUNE_DISPATCH(q.scalar_type(), "attn_colsum_qk", [&] {
    using acc_t = accumulate_t<scalar_t>;
    const acc_t* sums = lse.has_value() ? data_ptr<acc_t>(*lse) : nullptr;
    ColumnSums<vectorizable_t<scalar_t>, acc_t>(params, vector_ptr<scalar_t>(q), vector_ptr<scalar_t>(k), sums,
                                                data_ptr<acc_t>(out))
        .run();
  });
  return out;
}

}  // namespace
}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("attn_colsum_qk", TORCH_BOX(&tokenprune::attn_colsum_qk_cpu)); }
