// The patch tokens of an image are sorted by rank: the candidates of a token are then the first so many columns, and
// what lies behind them is not even multiplied. With two groups that is a quarter of all products, with distinct ranks
// half of them.
#include "nearest_token.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "../ops/nearest_token.h"
#include "dot_tile.h"

namespace tokenprune {
namespace {

constexpr int64_t kRows = 16;   // rows a task owns
constexpr int64_t kLanes = 16;  // similarities looked at together; divides the width of a panel

// The tokens of a batch, sorted by rank. A place is a position in that order.
struct Sorted {
  int64_t stride;    // places of an image, padded to whole panels
  int32_t* tokens;   // [batch, stride]: the token of every place
  int32_t* columns;  // [batch, stride]: how many places have a lower rank
};

void sort_image(const NearestTokenParams& params, const int64_t* rank, int32_t* tokens, int32_t* columns) {
  const int64_t n = params.patches();
  std::iota(tokens, tokens + n, static_cast<int32_t>(params.num_prefix));
  std::stable_sort(tokens, tokens + n, [rank](int32_t i, int32_t j) { return rank[i] < rank[j]; });
  for (int64_t place = 0; place < n; ++place) {
    const bool same = place > 0 && rank[tokens[place]] == rank[tokens[place - 1]];
    columns[place] = same ? columns[place - 1] : static_cast<int32_t>(place);
  }
}

// row = x, divided by what goes with the similarity; returns what is added to its products.
template <typename value_t, typename acc_t>
TOKENPRUNE_MULTIVERSION acc_t normalize(Similarity similarity, const value_t* __restrict__ x, int64_t d,
                                        acc_t* __restrict__ row) {
  acc_t squares[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      row[c + l] = static_cast<acc_t>(x[c + l]);
      squares[l] += row[c + l] * row[c + l];
    }
  }
  acc_t sum = 0;
  for (; c < d; ++c) {
    row[c] = static_cast<acc_t>(x[c]);
    sum += row[c] * row[c];
  }
  for (int64_t l = 0; l < kLanes; ++l) sum += squares[l];
  const acc_t term = token_term(similarity, sum, std::sqrt(sum));
  if (similarity == Similarity::kEuclidean) return term;
  for (c = 0; c < d; ++c) row[c] /= term;
  return 0;
}

template <typename acc_t>
TOKENPRUNE_MULTIVERSION void add_offsets(acc_t own, const acc_t* __restrict__ offsets, int64_t count,
                                         acc_t* __restrict__ similarity) {
  for (int64_t c = 0; c < count; ++c) similarity[c] += own + offsets[c];
}

// The largest of `count` similarities and the lowest token that has it. NaN is never the largest; without any other
// both results are -1. Writes to the similarities behind the last one, up to a multiple of kLanes.
template <typename acc_t>
TOKENPRUNE_MULTIVERSION void find_best(acc_t* __restrict__ similarity, const int32_t* __restrict__ tokens,
                                       int64_t count, acc_t* __restrict__ best, int64_t* __restrict__ index) {
  constexpr acc_t kNone = -std::numeric_limits<acc_t>::infinity();
  constexpr int32_t kNobody = std::numeric_limits<int32_t>::max();
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  std::fill(similarity + count, similarity + padded, kNone);
  acc_t largest[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) largest[l] = kNone;
  for (int64_t c = 0; c < padded; c += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) largest[l] = similarity[c + l] > largest[l] ? similarity[c + l] : largest[l];
  }
  const acc_t found = *std::max_element(largest, largest + kLanes);
  int32_t lowest[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lowest[l] = kNobody;
  for (int64_t c = 0; c < padded; c += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const int32_t token = similarity[c + l] == found ? tokens[c + l] : kNobody;
      lowest[l] = token < lowest[l] ? token : lowest[l];
    }
  }
  *best = found == kNone ? acc_t(-1) : found;
  *index = found == kNone ? -1 : *std::min_element(lowest, lowest + kLanes);
}

// Results of the rows [first, last) of one image, whose normalized rows, panels and offsets these are.
template <typename acc_t>
void match_rows(const NearestTokenParams& params, const int32_t* tokens, const int32_t* columns, int64_t first,
                int64_t last, const acc_t* rows, const acc_t* panels, const acc_t* offsets, acc_t* products,
                acc_t* similarity, int64_t* index) {
  const int64_t d = params.channels;
  const int64_t width = columns[last - 1];  // columns only become more
  const int64_t stride = padded_columns<acc_t>(width);
  dot_block(rows + first * d, last - first, d, panels, d, width, acc_t(1), products, stride);
  for (int64_t row = first; row < last; ++row) {
    acc_t* candidates = products + (row - first) * stride;
    if (params.similarity == Similarity::kEuclidean) add_offsets(offsets[row], offsets, columns[row], candidates);
    find_best(candidates, tokens, columns[row], similarity + tokens[row], index + tokens[row]);
  }
}

template <typename scalar_t>
void match_all(const NearestTokenParams& params, const Tensor& metric, const Sorted& sorted,
               accumulate_t<scalar_t>* similarity, int64_t* index) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t kWidth = panel_width<acc_t>();
  static_assert(kWidth % kLanes == 0);
  const auto* x = vector_ptr<scalar_t>(metric);
  const int64_t n = params.patches();
  const int64_t d = params.channels;
  const ScalarType acc_dtype = accumulate_dtype(metric);
  const Tensor normalized = torch::stable::new_empty(metric, {params.batch, n, d}, acc_dtype);
  const Tensor row_offsets = torch::stable::new_empty(metric, {params.batch, n}, acc_dtype);
  const Tensor packed = torch::stable::new_empty(metric, {params.batch, sorted.stride, d}, acc_dtype);
  acc_t* rows = data_ptr<acc_t>(normalized);
  acc_t* offsets = data_ptr<acc_t>(row_offsets);
  acc_t* panels = data_ptr<acc_t>(packed);

  const int64_t panel_count = (n + kWidth - 1) / kWidth;
  torch::stable::parallel_for(0, params.batch * panel_count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / panel_count;
      const int64_t first = task % panel_count * kWidth;
      const int64_t last = std::min(first + kWidth, n);
      const int32_t* tokens = sorted.tokens + image * sorted.stride;
      acc_t* own = rows + image * n * d;
      for (int64_t place = first; place < last; ++place) {
        offsets[image * n + place] =
            normalize(params.similarity, x + (image * params.tokens + tokens[place]) * d, d, own + place * d);
      }
      if (first >= sorted.columns[image * sorted.stride + n - 1]) continue;  // nobody's candidates
      pack_columns(own + first * d, d, last - first, d, panels + (image * sorted.stride + first) * d);
    }
  });

  const int64_t blocks = (n + kRows - 1) / kRows;
  torch::stable::parallel_for(0, params.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> products(kRows * sorted.stride);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks;
      // Later rows have more columns: one from each end in turn, so that threads get equal shares.
      const int64_t turn = task % blocks;
      const int64_t first = (turn % 2 ? blocks - 1 - turn / 2 : turn / 2) * kRows;
      match_rows(params, sorted.tokens + image * sorted.stride, sorted.columns + image * sorted.stride, first,
                 std::min(first + kRows, n), rows + image * n * d, panels + image * sorted.stride * d,
                 offsets + image * n, products.data(), similarity + image * params.tokens,
                 index + image * params.tokens);
    }
  });
}

std::tuple<Tensor, Tensor> nearest_token_cpu(Tensor metric, Tensor rank, int64_t num_prefix, std::string similarity,
                                             bool) {
  const NearestTokenParams params = check_nearest_token(metric, rank, num_prefix, similarity);
  return nearest_cpu(params, torch::stable::contiguous(metric), torch::stable::contiguous(rank));
}

}  // namespace

std::tuple<Tensor, Tensor> nearest_cpu(const NearestTokenParams& params, const Tensor& metric, const Tensor& rank) {
  Tensor similarity = torch::stable::new_empty(metric, {params.batch, params.tokens}, accumulate_dtype(metric));
  Tensor index = torch::stable::new_empty(metric, {params.batch, params.tokens}, ScalarType::Long);
  const int64_t stride = padded_columns<float>(params.patches());  // whole panels of double, too
  const Tensor sorted_tokens = torch::stable::new_empty(metric, {params.batch, stride}, ScalarType::Int);
  const Tensor sorted_columns = torch::stable::new_empty(metric, {params.batch, stride}, ScalarType::Int);
  const Sorted sorted{stride, data_ptr<int32_t>(sorted_tokens), data_ptr<int32_t>(sorted_columns)};
  TOKENPRUNE_DISPATCH(metric.scalar_type(), "nearest_token", [&] {
    using acc_t = accumulate_t<scalar_t>;
    acc_t* best = data_ptr<acc_t>(similarity);
    int64_t* chosen = data_ptr<int64_t>(index);
    torch::stable::parallel_for(0, params.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        sort_image(params, data_ptr<int64_t>(rank) + b * params.tokens, sorted.tokens + b * stride,
                   sorted.columns + b * stride);
        std::fill_n(best + b * params.tokens, params.num_prefix, acc_t(-1));
        std::fill_n(chosen + b * params.tokens, params.num_prefix, int64_t(-1));
      }
    });
    if (params.patches() > 0) match_all<scalar_t>(params, metric, sorted, best, chosen);
  });
  return {similarity, index};
}

}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("nearest_token", TORCH_BOX(&tokenprune::nearest_token_cpu)); }
