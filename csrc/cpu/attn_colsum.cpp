#include "../ops/attn_colsum.h"

#include <algorithm>
#include <string>

#include "simd.h"

namespace tokenprune {
namespace {

constexpr int64_t kTile = 256;  // columns a task owns
constexpr int64_t kRows = 32;   // rows summed on their own before they join the total: less rounding in long columns

// out[k] = the sum over rows of the reduction over heads, for `width` <= kTile columns. NaN propagates.
template <typename value_t, typename acc_t>
TOKENPRUNE_MULTIVERSION void reduce_tile(
    const AttnColsumParams& params,
    const value_t* __restrict__ attn,  // [heads, tokens, tokens] from the column on
    int64_t width,
    acc_t* __restrict__ out) {  // [width]
  acc_t row[kTile];
  acc_t sum[kTile];
  const int64_t head_stride = params.tokens * params.tokens;
  std::fill_n(out, width, acc_t(0));
  for (int64_t q = params.row_begin; q < params.row_end; ++q) {
    const value_t* a = attn + q * params.tokens;
    for (int64_t k = 0; k < width; ++k) row[k] = static_cast<acc_t>(a[k]);
    for (int64_t h = 1; h < params.heads; ++h) {
      a += head_stride;
      if (params.head_reduce == HeadReduce::kMax) {
        for (int64_t k = 0; k < width; ++k) {
          const acc_t value = static_cast<acc_t>(a[k]);
          row[k] = !(value <= row[k]) && row[k] == row[k] ? value : row[k];
        }
      } else {
        for (int64_t k = 0; k < width; ++k) row[k] += static_cast<acc_t>(a[k]);
      }
    }
    const int64_t place = (q - params.row_begin) % kRows;
    for (int64_t k = 0; k < width; ++k) sum[k] = place == 0 ? row[k] : sum[k] + row[k];
    if (place == kRows - 1 || q == params.row_end - 1) {
      for (int64_t k = 0; k < width; ++k) out[k] += sum[k];
    }
  }
  if (params.head_reduce == HeadReduce::kMean) {
    for (int64_t k = 0; k < width; ++k) out[k] /= static_cast<acc_t>(params.heads);
  }
}

Tensor attn_colsum_cpu(Tensor attn, std::string head_reduce, std::string query_rows, int64_t num_prefix) {
  const AttnColsumParams params = check_attn_colsum(attn, head_reduce, query_rows, num_prefix);
  attn = torch::stable::contiguous(attn);
  Tensor out = torch::stable::new_empty(attn, {params.batch, params.tokens}, accumulate_dtype(attn));
  const int64_t tiles = (params.tokens + kTile - 1) / kTile;
  TOKENPRUNE_DISPATCH(attn.scalar_type(), "attn_colsum", [&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto* a = vector_ptr<scalar_t>(attn);
    acc_t* received = data_ptr<acc_t>(out);
    const int64_t n = params.tokens;
    torch::stable::parallel_for(0, params.batch * tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / tiles;
        const int64_t column = task % tiles * kTile;
        const int64_t width = std::min(kTile, n - column);
        acc_t* dest = received + image * n + column;
        reduce_tile(params, a + image * params.heads * n * n + column, width, dest);
        const int64_t prefix_here = std::clamp(params.num_prefix - column, int64_t(0), width);
        std::fill_n(dest, prefix_here, acc_t(0));
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("attn_colsum", TORCH_BOX(&tokenprune::attn_colsum_cpu)); }
