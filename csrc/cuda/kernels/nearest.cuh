// The most similar token of lower rank, for every token. Tokens are put in the order of their ranks first: the
// candidates of a token are then the first so many, and tiles of products behind them are not formed. A block owns 64
// tokens, walks over the tiles of their candidates and keeps the best one so far.
#pragma once

#include <cmath>
#include <limits>

#include "../../ops/nearest_token_params.h"
#include "tile_product.cuh"

namespace tokenprune {

// A token's similarities are its products times a factor plus an offset: see token_term(). One load brings both.
template <typename acc_t>
struct alignas(2 * sizeof(acc_t)) NearestTerms {
  acc_t factor;
  acc_t offset;
};

// Patch tokens in the order of their ranks, equal ranks by position. A place is a position in that order.
template <typename value_t, typename acc_t>
struct NearestWorkspace {
  value_t* rows;               // [batch, patches, channels]: the tokens, summed over their heads
  NearestTerms<acc_t>* terms;  // [batch, patches]: NaN when the norm is not finite
  int32_t* tokens;             // [batch, patches]: their positions
  int32_t* columns;            // [batch, patches]: how many places have a lower rank
};

namespace nearest {

constexpr int kSortThreads = 256;
constexpr int kSortWarps = kSortThreads / kWarpSize;
constexpr int32_t kNobody = std::numeric_limits<int32_t>::max();

// A warp a token: finds its place, puts the sum over its heads there and measures it. A prefix token gets its results.
template <typename given_t, typename value_t, typename acc_t>
__global__ void __launch_bounds__(kSortThreads) sort_kernel(NearestTokenParams params,
                                                            const given_t* metric,  // [batch, heads, tokens, channels]
                                                            const int64_t* rank,    // [batch, tokens]
                                                            NearestWorkspace<value_t, acc_t> sorted,
                                                            acc_t* similarity,  // [batch, tokens]
                                                            int64_t* index) {   // [batch, tokens]
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSortWarps + threadIdx.x / kWarpSize;
  if (row >= params.batch * params.tokens) return;  // whole warps, and no barrier follows
  const int lane = threadIdx.x % kWarpSize;
  const int64_t image = row / params.tokens;
  const int64_t token = row % params.tokens;
  if (token < params.num_prefix) {
    if (lane == 0) {
      similarity[row] = -1;
      index[row] = -1;
    }
    return;
  }
  rank += image * params.tokens;
  const int64_t own = rank[token];
  int lower = 0;
  int equal_before = 0;
  for (int64_t j = params.num_prefix + lane; j < params.tokens; j += kWarpSize) {
    lower += rank[j] < own;
    equal_before += rank[j] == own && j < token;
  }
  lower = warp_sum(lower);
  const int64_t place = image * params.patches() + lower + warp_sum(equal_before);
  if (lane == 0) {
    sorted.tokens[place] = static_cast<int32_t>(token);
    sorted.columns[place] = lower;
  }
  metric += image * params.batch_stride + token * params.token_stride;
  value_t* sum = sorted.rows + place * params.channels;
  acc_t squares = 0;
  for (int64_t c = lane; c < params.channels; c += kWarpSize) {
    acc_t value = to_acc<acc_t>(metric[c]);
    for (int64_t h = 1; h < params.heads; ++h) value += to_acc<acc_t>(metric[h * params.head_stride + c]);
    sum[c] = from_acc<value_t>(value);
    squares += value * value;
  }
  squares = warp_sum(squares);
  if (lane == 0) {
    const acc_t term = token_term<acc_t>(params.similarity, squares, std::sqrt(squares));
    const bool adds = params.similarity == Similarity::kEuclidean;
    sorted.terms[place] = {adds ? acc_t(1) : acc_t(1) / term, adds ? term : acc_t(0)};
  }
}

// The best candidate of a row so far. NaN is never better.
template <typename acc_t>
struct Best {
  acc_t value = -std::numeric_limits<acc_t>::infinity();
  int32_t token = kNobody;

  __device__ void offer(acc_t other, int32_t other_token) {
    if (other > value || (other == value && other_token < token)) {
      value = other;
      token = other_token;
    }
  }
};

template <typename value_t, typename acc_t, bool kTf32>
__global__ void __launch_bounds__(tile::kThreads)
    match_kernel(NearestTokenParams params, int tiles, bool vectors, NearestWorkspace<value_t, acc_t> sorted,
                 acc_t* similarity,  // [batch, tokens]
                 int64_t* index) {   // [batch, tokens]
  using Fragment = tile::Fragment<acc_t>;
  const int64_t n = params.patches();
  const int64_t image = blockIdx.x / tiles;
  // Tiles of high ranks have the most candidates: they start first.
  const int64_t row = static_cast<int64_t>(tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * tile::kRows;
  const tile::Rows<value_t> rows{sorted.rows + image * n * params.channels, params.channels, n};
  const NearestTerms<acc_t>* terms = sorted.terms + image * n;
  const int32_t* tokens = sorted.tokens + image * n;
  const int32_t* columns = sorted.columns + image * n;

  int limit[2];  // of this thread's two rows
  Best<acc_t> best[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t place = row + Fragment::row(2 * half);
    limit[half] = place < n ? columns[place] : 0;
  }
  const int64_t last = row + tile::kRows < n ? row + tile::kRows - 1 : n - 1;
  for (int64_t column = 0; column < columns[last]; column += tile::kRows) {
    Fragment dot;
    tile::product<kTf32>(dynamic_shared(), rows, row, rows, column, static_cast<int>(params.channels), vectors, dot);
#pragma unroll
    for (int j = 0; j < Fragment::kGroups; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t place = column + Fragment::column(j, i);
        if (place >= limit[i / 2]) continue;
        acc_t value = dot.value[j][i] * terms[place].factor;  // one of both is neutral: together they take registers
        if (params.similarity == Similarity::kEuclidean) value = dot.value[j][i] + terms[place].offset;
        best[i / 2].offer(value, tokens[place]);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {  // the four that share a row
      const acc_t value = __shfl_xor_sync(0xffffffffu, best[half].value, lanes);
      const int32_t token = __shfl_xor_sync(0xffffffffu, best[half].token, lanes);
      best[half].offer(value, token);
    }
    const int64_t place = row + Fragment::row(2 * half);
    if (threadIdx.x % 4 == 0 && place < n) {
      const acc_t value = best[half].value * terms[place].factor + terms[place].offset;
      const bool found = best[half].token != kNobody && value == value;
      similarity[image * params.tokens + tokens[place]] = found ? value : acc_t(-1);
      index[image * params.tokens + tokens[place]] = found ? best[half].token : -1;
    }
  }
}

template <bool kTf32, typename value_t, typename acc_t>
cudaError_t launch_match(const NearestTokenParams& params, const NearestWorkspace<value_t, acc_t>& sorted,
                         acc_t* similarity, int64_t* index, cudaStream_t stream) {
  const int64_t tiles = ceil_div<int64_t>(params.patches(), tile::kRows);
  const bool vectors = can_copy_vectors(sorted.rows, {params.channels});
  return launch(match_kernel<value_t, acc_t, kTf32>, static_cast<unsigned>(params.batch * tiles), tile::kThreads,
                tile::shared_bytes<value_t>(), stream, params, static_cast<int>(tiles), vectors, sorted, similarity,
                index);
}

}  // namespace nearest

// value_t is the type that tokens are compared in: with several heads that of sums, else the given one.
template <bool kTf32, typename given_t, typename value_t, typename acc_t>
cudaError_t launch_nearest(const NearestTokenParams& params, const given_t* metric, const int64_t* rank,
                           const NearestWorkspace<value_t, acc_t>& sorted, acc_t* similarity, int64_t* index,
                           cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  const int64_t rows = params.batch * params.tokens;
  const cudaError_t error = launch(nearest::sort_kernel<given_t, value_t, acc_t>,
                                   static_cast<unsigned>(ceil_div<int64_t>(rows, nearest::kSortWarps)),
                                   nearest::kSortThreads, 0, stream, params, metric, rank, sorted, similarity, index);
  if (error != cudaSuccess || params.patches() == 0) return error;
  return nearest::launch_match<kTf32>(params, sorted, similarity, index, stream);
}

}  // namespace tokenprune
