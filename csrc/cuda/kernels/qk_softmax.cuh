// Softmax of q k^T without the matrix: the logarithm of every row's sum, and sums over the columns of the
// probabilities.
#pragma once

#include <limits>

#include "../../ops/qk_params.h"
#include "tile_product.cuh"

namespace tokenprune {
namespace qk {

template <typename value_t>
struct Operands {
  QkParams params;
  const value_t* q;
  const value_t* k;
  bool vectors;  // rows can be copied 16 bytes at a time

  __device__ tile::Rows<value_t> queries(int64_t image, int64_t head, int64_t end) const {
    return {q + params.q_offset(image, head), params.q_token_stride, end};
  }
  __device__ tile::Rows<value_t> keys(int64_t image, int64_t head) const {
    return {k + params.k_offset(image, head), params.k_token_stride, params.tokens};
  }
};

template <typename value_t>
Operands<value_t> operands(const QkParams& p, const value_t* q, const value_t* k) {
  return {p, q, k,
          can_copy_vectors(q, {p.channels, p.q_batch_stride, p.q_head_stride, p.q_token_stride}) &&
              can_copy_vectors(k, {p.channels, p.k_batch_stride, p.k_head_stride, p.k_token_stride})};
}

__device__ inline float exponential(float x) { return fast_exp2(x * 1.44269504f); }
__device__ inline double exponential(double x) { return exp(x); }

// lse[matrix, q] = log(sum over k of exp(scale * q . k)) for the rows row_begin .. row_end - 1: a block forms 64 of
// them.
template <bool kTf32, typename value_t, typename acc_t>
__global__ void __launch_bounds__(tile::kThreads) lse_kernel(Operands<value_t> in, int64_t row_begin, int64_t row_end,
                                                             acc_t* lse) {  // [batch, heads, tokens]
  const QkParams& p = in.params;
  const int64_t matrix = blockIdx.x;
  const int64_t first = row_begin + static_cast<int64_t>(blockIdx.y) * tile::kRows;
  const auto queries = in.queries(matrix / p.heads, matrix % p.heads, row_end);
  const auto keys = in.keys(matrix / p.heads, matrix % p.heads);
  const acc_t scale = static_cast<acc_t>(p.scale);
  tile::Fragment<acc_t> logits;
  acc_t largest[2], sum[2] = {};
  largest[0] = largest[1] = -std::numeric_limits<acc_t>::infinity();
  for (int64_t column = 0; column < p.tokens; column += tile::kRows) {
    tile::product<kTf32>(dynamic_shared(), queries, first, keys, column, static_cast<int>(p.channels), in.vectors,
                         logits);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // rows g and g + 8: four lanes share each
      acc_t top = largest[half];
#pragma unroll
      for (int j = 0; j < logits.kGroups; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          acc_t& logit = logits.value[j][i];
          logit *= scale;
          if (column + logits.column(j, i) >= p.tokens) logit = -std::numeric_limits<acc_t>::infinity();
          if (logit > top) top = logit;
        }
      }
      for (int bit = 1; bit <= 2; bit *= 2) {
        const acc_t other = __shfl_xor_sync(0xffffffffu, top, bit);
        if (other > top) top = other;
      }
      // Nothing but -infinity so far adds 0. A logit of +infinity or NaN makes the sum NaN, as in torch's softmax.
      const acc_t shift = top == -std::numeric_limits<acc_t>::infinity() ? acc_t(0) : top;
      sum[half] *= sum[half] == 0 ? acc_t(1) : exponential(largest[half] - shift);
      largest[half] = top;
#pragma unroll
      for (int j = 0; j < logits.kGroups; ++j) {
        sum[half] +=
            exponential(logits.value[j][2 * half] - shift) + exponential(logits.value[j][2 * half + 1] - shift);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    for (int bit = 1; bit <= 2; bit *= 2) sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], bit);
    const int64_t row = first + logits.row(2 * half);
    if (threadIdx.x % 4 == 0 && row < row_end) lse[matrix * p.tokens + row] = largest[half] + logarithm(sum[half]);
  }
}

// What one launch of column_kernel sums: matrices are taken `heads` at a time, reduced over these heads, and every row
// may have a weight.
template <typename acc_t>
struct Columns {
  int64_t heads;  // of a group: all of an image, or one
  int64_t row_begin;
  int64_t row_end;
  const acc_t* lse;      // [batch, all heads, tokens]
  const acc_t* weights;  // [groups, tokens], or null: ones
  const int* active;     // [groups], or null: groups with 0 are left out
  acc_t* partial;        // [groups, row tiles, tokens]
};

// The sums of one tile of 64 rows and 64 columns. Sums of a column over its tiles are left to whoever reads `partial`,
// who adds them in order: the result does not depend on how blocks run.
template <bool kTf32, bool kMax, typename value_t, typename acc_t>
__global__ void __launch_bounds__(tile::kThreads) column_kernel(Operands<value_t> in, Columns<acc_t> work) {
  const QkParams& p = in.params;
  const int64_t tiles = ceil_div<int64_t>(p.tokens, tile::kRows);
  const int64_t group = blockIdx.x / tiles;
  const int64_t column = blockIdx.x % tiles * tile::kRows;
  const int64_t first = work.row_begin + static_cast<int64_t>(blockIdx.y) * tile::kRows;
  if (work.active && work.active[group] == 0) return;  // the whole block

  const acc_t scale = static_cast<acc_t>(p.scale);
  tile::Fragment<acc_t> terms, reduced;
  for (int64_t h = 0; h < work.heads; ++h) {
    const int64_t matrix = group * work.heads + h;
    const int64_t image = matrix / p.heads, head = matrix % p.heads;
    tile::product<kTf32>(dynamic_shared(), in.queries(image, head, work.row_end), first, in.keys(image, head), column,
                         static_cast<int>(p.channels), in.vectors, terms);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + terms.row(2 * half);
      const bool valid = row < work.row_end;
      const acc_t shift = valid ? work.lse[matrix * p.tokens + row] : acc_t(0);
      const acc_t weight = work.weights && valid ? work.weights[group * p.tokens + row] : acc_t(1);
#pragma unroll
      for (int j = 0; j < terms.kGroups; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const acc_t term = valid ? weight * exponential(terms.value[j][i] * scale - shift) : acc_t(0);
          acc_t& joined = reduced.value[j][i];
          joined = h == 0 ? term : kMax ? max_nan(joined, term) : joined + term;
        }
      }
    }
  }

  // Rows g and g + 8 of this lane, then the rows of the warp's other lanes, then those of the other warps.
  TOKENPRUNE_SHARED(acc_t, sums, tile::kRowWarps * tile::kRows);
#pragma unroll
  for (int j = 0; j < reduced.kGroups; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      acc_t sum = reduced.value[j][i] + reduced.value[j][i + 2];
      for (int bit = 4; bit < kWarpSize; bit *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
      if (threadIdx.x % kWarpSize < 4) {
        sums[threadIdx.x / kWarpSize * tile::kRows + reduced.column(j, i)] = sum;
      }
    }
  }
  __syncthreads();
  const int c = threadIdx.x;
  if (c < tile::kRows && column + c < p.tokens) {
    work.partial[(group * gridDim.y + blockIdx.y) * p.tokens + column + c] =
        column_total<tile::kRowWarps, tile::kRows>(sums, c);
  }
}

// The sum of column k over the row tiles of a group.
template <typename acc_t>
__device__ acc_t tile_total(const acc_t* partial, int64_t group, int64_t row_tiles, int64_t tokens, int64_t k) {
  acc_t total = 0;
  for (int64_t t = 0; t < row_tiles; ++t) total += partial[(group * row_tiles + t) * tokens + k];
  return total;
}

constexpr int64_t row_tiles(int64_t row_begin, int64_t row_end) {
  return ceil_div<int64_t>(row_end - row_begin, tile::kRows);
}

template <bool kTf32, typename value_t, typename acc_t>
cudaError_t launch_lse(const Operands<value_t>& in, int64_t row_begin, int64_t row_end, acc_t* lse,
                       cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(in.params.batch * in.params.heads),
                  static_cast<unsigned>(row_tiles(row_begin, row_end)));
  return launch(lse_kernel<kTf32, value_t, acc_t>, grid, tile::kThreads, tile::shared_bytes<value_t>(), stream, in,
                row_begin, row_end, lse);
}

template <bool kTf32, bool kMax, typename value_t, typename acc_t>
cudaError_t launch_columns(const Operands<value_t>& in, const Columns<acc_t>& work, cudaStream_t stream) {
  const int64_t groups = in.params.batch * in.params.heads / work.heads;
  const dim3 grid(static_cast<unsigned>(groups * ceil_div<int64_t>(in.params.tokens, tile::kRows)),
                  static_cast<unsigned>(row_tiles(work.row_begin, work.row_end)));
  return launch(column_kernel<kTf32, kMax, value_t, acc_t>, grid, tile::kThreads, tile::shared_bytes<value_t>(), stream,
                in, work);
}

}  // namespace qk
}  // namespace tokenprune
