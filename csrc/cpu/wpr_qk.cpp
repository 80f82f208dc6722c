#include "../ops/wpr_qk.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "operators.h"
#include "page_rank.h"
#include "workspace.h"

namespace tokenprune {
namespace {

template <typename acc_t>
TOKENPRUNE_MULTIVERSION void scale_row(acc_t* row, int64_t n, acc_t factor) {
  for (int64_t k = 0; k < n; ++k) row[k] *= factor;
}

// Matrices beyond kThreadBytes, one after the other, each by all threads: kHeldBytes of it are held, what is more is
// formed again in every iteration. A step sums every block of queries, weighted by the scores,
// and adds the sums up in order. The first one keeps the probabilities of as many blocks as may be held, and the
// logarithms of all rows' sums, with which the other blocks are formed again.
template <typename value_t, typename acc_t>
class LargeMatrices {
 public:
  explicit LargeMatrices(const Matrices<value_t, acc_t>& work)
      : work_(work),
        qk_(work.params.qk),
        stride_(work.stride()),
        blocks_((qk_.tokens + kQueryBlock - 1) / kQueryBlock),
        held_(work.params.wpr.max_iters == 1 ? 0 : std::min(blocks_, kHeldBytes / work.bytes_of(kQueryBlock))),
        panels_(stride_ * qk_.channels),
        partial_(blocks_ * qk_.tokens),
        log_sums_(qk_.tokens),
        matrix_(held_ * kQueryBlock * stride_) {}

  void run() {
    const int64_t n = qk_.tokens;
    std::vector<acc_t> next(n);
    for (int64_t m = 0; m < work_.params.wpr.matrices; ++m) {
      acc_t* s = work_.scores + m * n;
      pack_columns(work_.keys(m), n, qk_.channels, panels_.data());
      power_start(work_.params.wpr, work_.start, m, s);
      bool first_step = true;
      power_iterate(work_.params.wpr, s, next.data(), [&](const acc_t* from, acc_t* to) {
        torch::stable::parallel_for(0, blocks_, 1, [&](int64_t begin, int64_t end) {
          AttentionRows<value_t, acc_t> rows(qk_);
          for (int64_t block = begin; block < end; ++block) add_block(m, block, first_step, rows, from);
        });
        first_step = false;
        std::fill_n(to, n, acc_t(0));
        for (int64_t block = 0; block < blocks_; ++block) add_scaled(acc_t(1), partial_.data() + block * n, n, to);
      });
    }
  }

 private:
  // Where the probabilities of a block are kept, or null. Those without a place lie evenly among the others: threads
  // get equal shares of the work.
  acc_t* place_of(int64_t block) const {
    const int64_t place = block * held_ / blocks_;
    return (block + 1) * held_ / blocks_ > place ? matrix_.data() + place * kQueryBlock * stride_ : nullptr;
  }

  void add_block(int64_t m, int64_t block, bool first_step, AttentionRows<value_t, acc_t>& rows, const acc_t* from) {
    const int64_t n = qk_.tokens;
    const int64_t first = block * kQueryBlock;
    const int64_t count = std::min(kQueryBlock, n - first);
    acc_t* kept = place_of(block);
    acc_t* terms = kept ? kept : rows.row(0);
    if (first_step || !kept) rows.form(work_.queries(m), panels_.data(), first, count);
    if (first_step) {
      acc_t shifts[kQueryBlock], sums[kQueryBlock];
      softmax_terms(rows.row(0), count, stride_, n, shifts, terms, sums);
      for (int64_t r = 0; r < count; ++r) {
        log_sums_[first + r] = shifts[r] + std::log(sums[r]);
        scale_row(terms + r * stride_, n, acc_t(1) / sums[r]);
      }
    } else if (!kept) {
      for (int64_t r = 0; r < count; ++r) exp_row(rows.row(r), n, log_sums_[first + r], terms + r * stride_);
    }
    power_step(terms, stride_, from + first, count, partial_.data() + block * n, n);
  }

  const Matrices<value_t, acc_t>& work_;
  QkParams qk_;
  int64_t stride_;
  int64_t blocks_;
  int64_t held_;  // blocks whose probabilities are kept
  std::vector<acc_t> panels_;
  std::vector<acc_t> partial_;   // [blocks, tokens]
  std::vector<acc_t> log_sums_;  // [tokens]
  Workspace<acc_t> matrix_;      // [held * kQueryBlock, stride]
};

// The tokens that are ranked, image after image. Positions come from data, so this is the first place that can see a
// wrong one.
std::vector<int64_t> taken_tokens(const WprQkParams& params, const int64_t* among) {
  std::vector<int64_t> taken(params.qk.batch * params.qk.tokens);
  const int64_t low = params.num_prefix;
  bool good = true;
  int64_t* to = taken.data();
  for (int64_t b = 0; b < params.qk.batch; ++b, among += params.named()) {
    for (int64_t i = 0; i < low; ++i) *to++ = i;
    for (int64_t i = 0; i < params.named(); ++i) {
      good &= (i == 0 ? low : among[i - 1] + 1) <= among[i] && among[i] < params.source_tokens;
      *to++ = among[i];
    }
  }
  STD_TORCH_CHECK(good, "among must hold ascending positions in ", low, "..", params.source_tokens - 1,
                  " (patch tokens)");
  return taken;
}

}  // namespace

Tensor wpr_qk_cpu(Tensor q, Tensor k, double scale, std::optional<Tensor> start, int64_t max_iters, double tol,
                  std::optional<Tensor> among, int64_t num_prefix, bool) {
  const WprQkParams params = check_wpr_qk(q, k, scale, start, max_iters, tol, among, num_prefix);
  std::vector<int64_t> taken;
  if (among.has_value()) taken = taken_tokens(params, data_ptr<const int64_t>(*among));
  Tensor out = allocate(q, {params.qk.batch, params.qk.heads, params.qk.tokens}, accumulate_dtype(q));
  TOKENPRUNE_DISPATCH(q.scalar_type(), "wpr_qk", [&] {
    using acc_t = accumulate_t<scalar_t>;
    const acc_t* first = start.has_value() ? data_ptr<acc_t>(*start) : nullptr;
    const Matrices<vectorizable_t<scalar_t>, acc_t> work{params,
                                                         vector_ptr<scalar_t>(q),
                                                         vector_ptr<scalar_t>(k),
                                                         first,
                                                         among.has_value() ? taken.data() : nullptr,
                                                         data_ptr<acc_t>(out)};
    if (work.bytes_of(params.qk.tokens) <= kThreadBytes) {
      torch::stable::parallel_for(0, params.wpr.matrices, 1,
                                  [&](int64_t begin, int64_t end) { rank_small(work, begin, end); });
    } else {
      LargeMatrices(work).run();
    }
  });
  return out;
}

}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("wpr_qk", TORCH_BOX(&tokenprune::wpr_qk_cpu)); }
