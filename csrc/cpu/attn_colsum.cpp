#include "../ops/attn_colsum.h"

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "column_sums.h"
#include "head_reduce.h"

namespace tokenprune {
namespace {

constexpr int64_t kRows = 64;  // most queries of a task, whose entries lie side by side in each head

// Entries that are reduced over the heads together.
template <typename acc_t>
constexpr int64_t kStrip = 128 / static_cast<int64_t>(sizeof(acc_t));

// out[k] = the sum over `rows` queries of the reduction over heads of their entries k. A head's rows are walked through
// as one, so that a strip may begin in one row and end in the next: `sums` has room for n + kStrip.
template <int kBytes, bool kMax, typename value_t, typename acc_t>
[[gnu::always_inline]] inline void sum_rows(const value_t* __restrict__ entries, int64_t head_stride, int64_t heads,
                                            int64_t rows, int64_t n, acc_t* __restrict__ sums,
                                            acc_t* __restrict__ out) {
  using Reduction = HeadReduction<kMax, acc_t>;
  constexpr int64_t kWidth = kStrip<acc_t>;
  const int64_t length = rows * n;
  int64_t column = 0;
  int64_t first = 0;
  std::fill_n(sums, n + kWidth, acc_t(0));
  for (; first + kWidth <= length; first += kWidth) {
    HeadStrip<kMax, kBytes, kWidth, acc_t>(entries + first, heads, head_stride).template add_to<kWidth>(sums + column);
    column += kWidth;
    while (column >= n) column -= n;
  }
  for (; first < length; ++first, ++column) {
    acc_t reduced = Reduction::kNothing;
    for (int64_t h = 0; h < heads; ++h) {
      reduced = Reduction::join(reduced, static_cast<acc_t>(entries[h * head_stride + first]));
    }
    sums[column] += reduced;
  }
  std::copy_n(sums, n, out);
  for (int64_t i = n; i < n + kWidth; i += n) {
    for (int64_t k = 0; k < std::min(n, n + kWidth - i); ++k) out[k] += sums[i + k];
  }
}

Tensor attn_colsum_cpu(Tensor attn, std::string head_reduce, std::string query_rows, int64_t num_prefix) {
  const AttnColsumParams params = check_attn_colsum(attn, head_reduce, query_rows, num_prefix);
  attn = as_contiguous(attn);
  Tensor out = allocate(attn, {params.batch, params.tokens}, accumulate_dtype(attn));
  const int64_t queries = params.row_end - params.row_begin;
  const int64_t blocks = (queries + kRows - 1) / kRows;
  TOKENPRUNE_DISPATCH(attn.scalar_type(), "attn_colsum", [&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto* a = vector_ptr<scalar_t>(attn);
    const int64_t n = params.tokens;
    std::vector<acc_t> partial(params.batch * blocks * n);
    const auto run = [&](auto max) {
      torch::stable::parallel_for(0, params.batch * blocks, 1, [&](int64_t begin, int64_t end) {
        std::vector<acc_t> sums(n + kStrip<acc_t>);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t block = task % blocks;
          const int64_t first = params.row_begin + block * queries / blocks;  // blocks of the same size, or one less
          const int64_t rows = params.row_begin + (block + 1) * queries / blocks - first;
          const auto* entries = a + (task / blocks * params.heads * n + first) * n;
          with_vectors([&](auto bytes) __attribute__((always_inline)) {
            sum_rows<bytes(), max()>(entries, n * n, params.heads, rows, n, sums.data(), partial.data() + task * n);
          });
        }
      });
    };
    params.head_reduce == HeadReduce::kMax ? run(std::true_type()) : run(std::false_type());
    for (int64_t image = 0; image < params.batch; ++image) {
      total_of_blocks(params, partial.data() + image * blocks * n, blocks, data_ptr<acc_t>(out) + image * n);
    }
  });
  return out;
}

}  // namespace
}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("attn_colsum", TORCH_BOX(&tokenprune::attn_colsum_cpu)); }
