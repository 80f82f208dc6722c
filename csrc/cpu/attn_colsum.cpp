#include "../ops/attn_colsum.h"

#include <algorithm>
#include <string>
#include <vector>

#include "column_sums.h"

namespace tokenprune {
namespace {

constexpr int64_t kRows = 16;  // queries of a task, whose entries lie side by side in each head

// reduced[i] = the reduction over heads of entries[h * head_stride + i], a few entries at a time in registers. NaN
// propagates.
template <bool kMax, typename value_t, typename acc_t>
TOKENPRUNE_MULTIVERSION void reduce_heads(const value_t* __restrict__ entries, int64_t head_stride, int64_t heads,
                                          int64_t length, acc_t* __restrict__ reduced) {
  constexpr int64_t kWidth = 256 / static_cast<int64_t>(sizeof(acc_t));
  for (int64_t first = 0; first < length; first += kWidth) {
    const int64_t width = std::min(kWidth, length - first);
    acc_t part[kWidth];
    for (int64_t h = 0; h < heads; ++h) {
      const value_t* from = entries + h * head_stride + first;
      const auto join = [&](int64_t i) {
        const acc_t value = static_cast<acc_t>(from[i]);
        if (h == 0) {
          part[i] = value;
        } else if constexpr (kMax) {
          part[i] = !(value <= part[i]) && part[i] == part[i] ? value : part[i];
        } else {
          part[i] += value;
        }
      };
      if (width == kWidth) {
        for (int64_t i = 0; i < kWidth; ++i) join(i);
      } else {
        for (int64_t i = 0; i < width; ++i) join(i);
      }
    }
    std::copy_n(part, width, reduced + first);
  }
}

Tensor attn_colsum_cpu(Tensor attn, std::string head_reduce, std::string query_rows, int64_t num_prefix) {
  const AttnColsumParams params = check_attn_colsum(attn, head_reduce, query_rows, num_prefix);
  attn = torch::stable::contiguous(attn);
  Tensor out = torch::stable::new_empty(attn, {params.batch, params.tokens}, accumulate_dtype(attn));
  const int64_t blocks = (params.row_end - params.row_begin + kRows - 1) / kRows;
  TOKENPRUNE_DISPATCH(attn.scalar_type(), "attn_colsum", [&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto* a = vector_ptr<scalar_t>(attn);
    const int64_t n = params.tokens;
    std::vector<acc_t> partial(params.batch * blocks * n);
    torch::stable::parallel_for(0, params.batch * blocks, 1, [&](int64_t begin, int64_t end) {
      std::vector<acc_t> reduced(kRows * n);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = params.row_begin + task % blocks * kRows;
        const int64_t count = std::min(kRows, params.row_end - first);
        const auto* rows = a + (task / blocks * params.heads * n + first) * n;
        if (params.head_reduce == HeadReduce::kMax) {
          reduce_heads<true>(rows, n * n, params.heads, count * n, reduced.data());
        } else {
          reduce_heads<false>(rows, n * n, params.heads, count * n, reduced.data());
        }
        add_rows(reduced.data(), count, n, n, partial.data() + task * n);
      }
    });
    for (int64_t image = 0; image < params.batch; ++image) {
      total_of_blocks(params, partial.data() + image * blocks * n, blocks, data_ptr<acc_t>(out) + image * n);
    }
  });
  return out;
}

}  // namespace
}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("attn_colsum", TORCH_BOX(&tokenprune::attn_colsum_cpu)); }
