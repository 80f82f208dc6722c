// Attention received from queries and keys: the sums of every tile (qk_softmax.cuh), then the sums over the tiles.
#pragma once

#include "../../ops/attn_colsum_qk_params.h"
#include "qk_softmax.cuh"

namespace tokenprune {
namespace attn_colsum_qk {

constexpr int kThreads = 256;

template <typename acc_t>
__global__ void __launch_bounds__(kThreads) total_kernel(AttnColsumParams params, int64_t row_tiles,
                                                         const acc_t* partial,  // [batch, row_tiles, tokens]
                                                         acc_t* out) {          // [batch, tokens]
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.batch * params.tokens) return;
  const int64_t k = i % params.tokens;
  const acc_t scale = params.head_reduce == HeadReduce::kMean ? static_cast<acc_t>(params.heads) : acc_t(1);
  const acc_t total = qk::tile_total(partial, i / params.tokens, row_tiles, params.tokens, k);
  out[i] = k < params.num_prefix ? acc_t(0) : total / scale;
}

}  // namespace attn_colsum_qk

// Numbers of the workspace that launch_attn_colsum_qk needs: sums of the tiles and, when it is not given, the lse.
inline int64_t attn_colsum_qk_workspace(const AttnColsumQkParams& params, bool has_lse) {
  const int64_t tiles = qk::row_tiles(params.colsum.row_begin, params.colsum.row_end);
  return params.qk.batch * params.qk.tokens * (tiles + (has_lse ? 0 : params.qk.heads));
}

template <bool kTf32, typename value_t, typename acc_t>
cudaError_t launch_attn_colsum_qk(const AttnColsumQkParams& params, const value_t* q, const value_t* k,
                                  const acc_t* lse,  // [batch, heads, tokens], or null
                                  acc_t* workspace, acc_t* out, cudaStream_t stream) {
  if (params.qk.batch == 0) return cudaSuccess;
  const AttnColsumParams& colsum = params.colsum;
  const auto in = qk::operands(params.qk, q, k);
  const int64_t tiles = qk::row_tiles(colsum.row_begin, colsum.row_end);
  acc_t* partial = workspace;
  if (tiles > 0) {
    if (!lse) {
      acc_t* own = workspace + params.qk.batch * tiles * params.qk.tokens;
      const auto error = qk::launch_lse<kTf32>(in, colsum.row_begin, colsum.row_end, own, stream);
      if (error != cudaSuccess) return error;
      lse = own;
    }
    const qk::Columns<acc_t> work{colsum.heads, colsum.row_begin, colsum.row_end, lse, nullptr, nullptr, partial};
    const auto error = colsum.head_reduce == HeadReduce::kMax ? qk::launch_columns<kTf32, true>(in, work, stream)
                                                              : qk::launch_columns<kTf32, false>(in, work, stream);
    if (error != cudaSuccess) return error;
  }
  const int64_t blocks = ceil_div<int64_t>(colsum.batch * colsum.tokens, attn_colsum_qk::kThreads);
  return launch(attn_colsum_qk::total_kernel<acc_t>, static_cast<unsigned>(blocks), attn_colsum_qk::kThreads, 0, stream,
                colsum, tiles, partial, out);
}

}  // namespace tokenprune
