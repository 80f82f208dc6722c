// The patch tokens of an image are sorted by rank: the candidates of a token are then the first so many columns, and
// what lies behind them is not even multiplied. With two groups that is a quarter of all products, with distinct ranks
// half of them.
#include "nearest_token.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "../ops/nearest_token.h"
#include "best_of_row.h"
#include "dot_tile.h"

namespace tokenprune {
namespace {

constexpr int64_t kRows = 16;     // rows a task owns
constexpr int64_t kTogether = 4;  // of them, those with as many columns as the last
constexpr int64_t kLanes = kBestLanes;

// The patch tokens of one image, sorted by rank. A place is a position in that order.
template <typename acc_t>
struct Sorted {
  explicit Sorted(const NearestTokenParams& params)
      : stride(padded_columns<acc_t>(params.patches())),
        tokens(stride),
        columns(params.patches()),
        offsets(params.patches()),
        panels(new acc_t[stride * params.channels]) {}

  int64_t stride;                   // places, padded to whole panels
  std::vector<int32_t> tokens;      // [stride]: the token of every place
  std::vector<int32_t> columns;     // [patches]: how many places have a lower rank
  std::vector<acc_t> offsets;       // [patches]: what is added to the products of a place
  std::unique_ptr<acc_t[]> panels;  // [stride / width, channels, width]: the tokens, divided by what goes with them
};

template <typename acc_t>
void sort_image(const NearestTokenParams& params, const int64_t* rank, Sorted<acc_t>& sorted) {
  const int64_t n = params.patches();
  int32_t* tokens = sorted.tokens.data();
  std::iota(tokens, tokens + n, static_cast<int32_t>(params.num_prefix));
  std::stable_sort(tokens, tokens + n, [rank](int32_t i, int32_t j) { return rank[i] < rank[j]; });
  for (int64_t place = 0; place < n; ++place) {
    const bool same = place > 0 && rank[tokens[place]] == rank[tokens[place - 1]];
    sorted.columns[place] = same ? sorted.columns[place - 1] : static_cast<int32_t>(place);
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

// The tokens of all places, ready to be multiplied, in panels.
template <typename value_t, typename acc_t>
void pack_rows(const NearestTokenParams& params, const value_t* x, Sorted<acc_t>& sorted) {
  constexpr int64_t kWidth = panel_width<acc_t>();
  const int64_t n = params.patches();
  const int64_t d = params.channels;
  torch::stable::parallel_for(0, sorted.stride / kWidth, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<acc_t[]> rows(new acc_t[kWidth * d]);
    for (int64_t first = begin * kWidth; first < end * kWidth; first += kWidth) {
      const int64_t count = std::min(kWidth, n - first);
      for (int64_t i = 0; i < count; ++i) {
        const value_t* token = x + sorted.tokens[first + i] * d;
        sorted.offsets[first + i] = normalize(params.similarity, token, d, rows.get() + i * d);
      }
      pack_columns(rows.get(), d, count, d, sorted.panels.get() + first * d);
    }
  });
}

// Results of one image. Each place's row of similarities goes to `products` [patches, stride], or nowhere.
template <typename acc_t>
void match_places(const NearestTokenParams& params, const Sorted<acc_t>& sorted, acc_t* products, acc_t* similarity,
                  int64_t* index) {
  constexpr int64_t kWidth = panel_width<acc_t>();
  static_assert(kWidth % kRows == 0 && kWidth % kLanes == 0);
  const int64_t n = params.patches();
  const int64_t d = params.channels;
  const int64_t stride = sorted.stride;
  const int64_t blocks = (n + kRows - 1) / kRows;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<acc_t[]> own(products ? nullptr : new acc_t[kRows * stride]);
    for (int64_t turn = begin; turn < end; ++turn) {
      // Later rows have more columns: one from each end in turn, so that threads get equal shares.
      const int64_t first = (turn % 2 ? blocks - 1 - turn / 2 : turn / 2) * kRows;
      const int64_t count = std::min(kRows, n - first);
      const acc_t* rows = sorted.panels.get() + first / kWidth * kWidth * d + first % kWidth;
      acc_t* out = products ? products + first * stride : own.get();
      for (int64_t r = 0; r < count; r += kTogether) {
        const int64_t last = std::min(r + kTogether, count) - 1;  // columns only become more from row to row
        dot_block({rows + r, 1, kWidth}, last + 1 - r, sorted.panels.get(), d, sorted.columns[first + last], acc_t(1),
                  out + r * stride, stride);
      }
      for (int64_t r = 0; r < count; ++r) {
        const int32_t token = sorted.tokens[first + r];
        const int32_t columns = sorted.columns[first + r];
        acc_t* row = out + r * stride;
        if (params.similarity == Similarity::kEuclidean) {
          add_offsets(sorted.offsets[first + r], sorted.offsets.data(), columns, row);
        }
        find_best(row, sorted.tokens.data(), columns, similarity + token, index + token);
      }
    }
  });
}

template <typename scalar_t>
void match_all(const NearestTokenParams& params, const Tensor& metric, const Tensor& rank, const Follow* follow,
               accumulate_t<scalar_t>* similarity, int64_t* index) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t n = params.patches();
  const auto match_images = [&](int64_t begin, int64_t end) {
    Sorted<acc_t> sorted(params);
    const std::unique_ptr<acc_t[]> products(follow ? new acc_t[n * sorted.stride] : nullptr);
    for (int64_t b = begin; b < end; ++b) {
      acc_t* best = similarity + b * params.tokens;
      int64_t* chosen = index + b * params.tokens;
      std::fill_n(best, params.num_prefix, acc_t(-1));
      std::fill_n(chosen, params.num_prefix, int64_t(-1));
      if (n == 0) continue;
      sort_image(params, data_ptr<int64_t>(rank) + b * params.tokens, sorted);
      pack_rows(params, vector_ptr<scalar_t>(metric) + b * params.tokens * params.channels, sorted);
      match_places(params, sorted, products.get(), best, chosen);
      if (follow) (*follow)(b, {products.get(), sorted.stride, sorted.tokens.data(), best});
    }
  };
  // A thread an image where that keeps all busy, since an image fits its cache; else all threads on each image in turn.
  const int64_t threads = torch::stable::get_num_threads();
  if (params.batch % threads == 0 || params.batch >= 4 * threads) {
    torch::stable::parallel_for(0, params.batch, 1, match_images);
  } else {
    match_images(0, params.batch);
  }
}

std::tuple<Tensor, Tensor> nearest_token_cpu(Tensor metric, Tensor rank, int64_t num_prefix, std::string similarity,
                                             bool) {
  const NearestTokenParams params = check_nearest_token(metric, rank, num_prefix, similarity);
  return nearest_cpu(params, torch::stable::contiguous(metric), torch::stable::contiguous(rank));
}

}  // namespace

std::tuple<Tensor, Tensor> nearest_cpu(const NearestTokenParams& params, const Tensor& metric, const Tensor& rank,
                                       const Follow* follow) {
  Tensor similarity = torch::stable::new_empty(metric, {params.batch, params.tokens}, accumulate_dtype(metric));
  Tensor index = torch::stable::new_empty(metric, {params.batch, params.tokens}, ScalarType::Long);
  TOKENPRUNE_DISPATCH(metric.scalar_type(), "nearest_token", [&] {
    match_all<scalar_t>(params, metric, rank, follow, data_ptr<accumulate_t<scalar_t>>(similarity),
                        data_ptr<int64_t>(index));
  });
  return {similarity, index};
}

}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("nearest_token", TORCH_BOX(&tokenprune::nearest_token_cpu)); }
