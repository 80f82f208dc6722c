// The patch tokens of an image are put in an order in which the candidates of a token are the first so many columns;
// what lies behind them is not even multiplied. With two groups that is a quarter of all products, with distinct ranks
// half of them.
#include "nearest_token.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "../ops/nearest_token.h"
#include "best_of_row.h"
#include "dot_tile.h"
#include "head_reduce.h"

namespace tokenprune {
namespace {

constexpr int64_t kRows = 16;  // rows a task owns
constexpr int64_t kLanes = kBestLanes;

// The patch tokens of one image in their order. A place is a position in it.
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
  std::vector<int32_t> columns;     // [patches]: how many of the first places are its candidates
  std::vector<acc_t> offsets;       // [patches]: what is added to the products of a place
  std::unique_ptr<acc_t[]> panels;  // [stride / width, channels, width]: the tokens, divided by what goes with them
};

// row = the sum over the heads of x, divided by what goes with the similarity; returns what is added to its products.
template <int kBytes, typename value_t, typename acc_t>
[[gnu::always_inline]] inline acc_t normalize(const NearestTokenParams& params, const value_t* __restrict__ x,
                                              acc_t* __restrict__ row) {
  using Strip = HeadStrip<false, kBytes, kLanes, acc_t>;
  const int64_t d = params.channels;
  typename Strip::vector_t squares[Strip::kVectors] = {};
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) {
    const Strip strip(x + c, params.heads, params.head_stride);
#pragma GCC unroll 8
    for (int64_t v = 0; v < Strip::kVectors; ++v) {
      *reinterpret_cast<typename Strip::vector_t*>(row + c + v * Strip::kLanes) = strip.reduced[v];
      squares[v] += strip.reduced[v] * strip.reduced[v];
    }
  }
#pragma GCC unroll 8
  for (int64_t half = Strip::kVectors / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < half; ++v) squares[v] += squares[v + half];
  }
  acc_t sum = join_lanes<Sum>(squares[0]);
  for (; c < d; ++c) {
    row[c] = static_cast<acc_t>(x[c]);
    for (int64_t h = 1; h < params.heads; ++h) row[c] += static_cast<acc_t>(x[h * params.head_stride + c]);
    sum += row[c] * row[c];
  }
  const acc_t term = token_term(params.similarity, sum, std::sqrt(sum));
  if (params.similarity == Similarity::kEuclidean) return term;
  const acc_t factor = 1 / term;
  for (c = 0; c < d; ++c) row[c] *= factor;
  return 0;
}

template <typename acc_t>
TOKENPRUNE_MULTIVERSION void add_offsets(acc_t own, const acc_t* __restrict__ offsets, int64_t count,
                                         acc_t* __restrict__ similarity) {
  for (int64_t c = 0; c < count; ++c) similarity[c] += own + offsets[c];
}

template <typename value_t>
[[gnu::always_inline]] inline void prefetch_token(const NearestTokenParams& params, const value_t* x) {
  for (int64_t h = 0; h < params.heads; ++h, x += params.head_stride) {
    for (int64_t c = 0; c < params.channels; c += 64 / static_cast<int64_t>(sizeof(value_t))) __builtin_prefetch(x + c);
  }
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
      with_vectors([&](auto bytes) __attribute__((always_inline)) {
        for (int64_t i = 0; i < count; ++i) {
          const value_t* token = x + sorted.tokens[first + i] * params.token_stride;
          if (i + 1 < count) prefetch_token(params, x + sorted.tokens[first + i + 1] * params.token_stride);
          sorted.offsets[first + i] = normalize<bytes()>(params, token, rows.get() + i * d);
        }
      });
      pack_columns(TokenRows<acc_t>{rows.get(), d}, count, d, sorted.panels.get() + first * d);
    }
  });
}

// Results of one image. Each place's row of similarities goes to `products` [stride, stride], or nowhere.
template <typename acc_t>
void match_places(const NearestTokenParams& params, const Sorted<acc_t>& sorted, acc_t* products, acc_t* similarity,
                  int64_t* index) {
  constexpr int64_t kWidth = panel_width<acc_t>();
  static_assert(kWidth % kRows == 0 && kWidth % kLanes == 0);
  const int64_t n = params.patches();
  const int64_t d = params.channels;
  const int64_t stride = sorted.stride;
  const int64_t blocks = (n + kRows - 1) / kRows;
  const int64_t together = rows_at_once();
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<acc_t[]> own(products ? nullptr : new acc_t[kRows * stride]);
    for (int64_t turn = begin; turn < end; ++turn) {
      // Later rows have more columns: one from each end in turn, so that threads get equal shares.
      const int64_t first = (turn % 2 ? blocks - 1 - turn / 2 : turn / 2) * kRows;
      const int64_t count = std::min(kRows, n - first);
      const acc_t* rows = sorted.panels.get() + first / kWidth * kWidth * d + first % kWidth;
      acc_t* out = products ? products + first * stride : own.get();
      for (int64_t r = 0; r < count; r += together) {
        const int64_t last = std::min(r + together, count) - 1;  // columns only become more from row to row
        dot_block({rows + r, 1, kWidth}, together, sorted.panels.get(), d, sorted.columns[first + last], acc_t(1),
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
void search_all(const NearestTokenParams& params, const Tensor& metric, const Order& order, bool keep_rows,
                const Finish& finish) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t n = params.patches();
  const auto* x = vector_ptr<scalar_t>(metric);
  const auto match_images = [&](int64_t begin, int64_t end) {
    Sorted<acc_t> sorted(params);
    const std::unique_ptr<acc_t[]> rows(keep_rows ? new acc_t[sorted.stride * sorted.stride] : nullptr);
    std::vector<acc_t> similarity(params.tokens, acc_t(-1));
    std::vector<int64_t> candidate(params.tokens, -1);
    for (int64_t b = begin; b < end; ++b) {
      if (n > 0) {
        order(b, sorted.tokens.data(), sorted.columns.data());
        pack_rows(params, x + b * params.batch_stride, sorted);
        match_places(params, sorted, rows.get(), similarity.data(), candidate.data());
      }
      finish(b, {sorted.tokens.data(), rows.get(), sorted.stride, similarity.data(), candidate.data()});
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

// Sorted by rank; the candidates are the places of lower rank.
void sort_by_rank(const NearestTokenParams& params, const int64_t* rank, int32_t* tokens, int32_t* columns) {
  const int64_t n = params.patches();
  std::iota(tokens, tokens + n, static_cast<int32_t>(params.num_prefix));
  std::stable_sort(tokens, tokens + n, [rank](int32_t i, int32_t j) { return rank[i] < rank[j]; });
  for (int64_t place = 0; place < n; ++place) {
    const bool same = place > 0 && rank[tokens[place]] == rank[tokens[place - 1]];
    columns[place] = same ? columns[place - 1] : static_cast<int32_t>(place);
  }
}

std::tuple<Tensor, Tensor> nearest_token_cpu(Tensor metric, Tensor rank, int64_t num_prefix, std::string name, bool) {
  const NearestTokenParams params = check_nearest_token(metric, rank, num_prefix, name);
  rank = as_contiguous(rank);
  Tensor similarity = allocate(metric, {params.batch, params.tokens}, accumulate_dtype(metric));
  Tensor index = allocate(metric, {params.batch, params.tokens}, ScalarType::Long);
  const int64_t* ranks = data_ptr<const int64_t>(rank);
  int64_t* chosen = data_ptr<int64_t>(index);
  auto* best = static_cast<char*>(similarity.data_ptr());
  const int64_t bytes = params.tokens * (accumulate_dtype(metric) == ScalarType::Double ? 8 : 4);
  const auto order = [&](int64_t image, int32_t* tokens, int32_t* columns) {
    sort_by_rank(params, ranks + image * params.tokens, tokens, columns);
  };
  const auto finish = [&](int64_t image, const Found& found) {
    std::memcpy(best + image * bytes, found.similarity, bytes);
    std::copy_n(found.candidate, params.tokens, chosen + image * params.tokens);
  };
  search_nearest(params, metric, order, false, finish);
  return {similarity, index};
}

}  // namespace

void search_nearest(const NearestTokenParams& params, const Tensor& metric, const Order& order, bool keep_rows,
                    const Finish& finish) {
  TOKENPRUNE_DISPATCH(metric.scalar_type(), "nearest_token",
                      [&] { search_all<scalar_t>(params, metric, order, keep_rows, finish); });
}

}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("nearest_token", TORCH_BOX(&tokenprune::nearest_token_cpu)); }
