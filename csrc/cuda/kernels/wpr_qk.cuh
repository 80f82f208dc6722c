// Weighted page rank from queries and keys. A matrix that fits is formed in the shared memory of one block, or of those
// of a cluster, each some of its rows, and iterated there (resident_kernel). For more tokens every iteration forms the
// products again, spread over the whole device: two launches an iteration, which leave out the heads that have
// converged. Where only some tokens are ranked, take_kernel lays their rows side by side first: tiles of rows are read
// again and again, and a kernel that forms products has no registers left for looking rows up.
#pragma once

#include "../../ops/wpr_qk_params.h"
#include "qk_softmax.cuh"
#include "wpr.cuh"

namespace tokenprune {
namespace wpr_qk {

// Probabilities of 16-bit inputs are held as half, so that matrices of about 250 tokens fit one block.
template <typename value_t>
struct Resident {
  using type = value_t;
};
template <>
struct Resident<__nv_bfloat16> {
  using type = __half;
};

// The factors of the rows come first, then the tiles of q and k, whose place the iteration uses again, then the matrix.
template <typename acc_t>
constexpr int64_t tiles_offset(int64_t tokens, int blocks) {
  return ceil_div<int64_t>(rows_of_block(tokens, blocks) * static_cast<int64_t>(sizeof(acc_t)), 16) * 16;
}
template <typename value_t, typename acc_t>
constexpr int64_t matrix_offset(int64_t tokens, int blocks) {
  const int64_t scores = wpr::scratch_bytes<acc_t>(tokens, blocks);
  const int64_t tiles = tile::shared_bytes<value_t>();
  return tiles_offset<acc_t>(tokens, blocks) + ceil_div<int64_t>(tiles > scores ? tiles : scores, 16) * 16;
}
template <typename value_t, typename acc_t>
constexpr int64_t resident_bytes(int64_t tokens, int blocks) {
  using resident_t = typename Resident<value_t>::type;
  const int64_t numbers = rows_of_block(tokens, blocks) * tokens;
  return matrix_offset<value_t, acc_t>(tokens, blocks) + numbers * static_cast<int64_t>(sizeof(resident_t));
}

template <bool kTf32, bool kCluster, typename value_t, typename acc_t>
__global__ void __launch_bounds__(wpr::kThreads, 1)
    resident_kernel(qk::Operands<value_t> in, WprParams params, int blocks,
                    const acc_t* lse,    // [matrices, n]
                    const acc_t* start,  // [n], [matrices, n] or null
                    acc_t* out) {        // [matrices, n]
  using resident_t = typename Resident<value_t>::type;
  const QkParams& p = in.params;
  const int n = static_cast<int>(params.tokens);
  const int64_t matrix = kCluster ? blockIdx.x / blocks : blockIdx.x;
  acc_t* row_scale = reinterpret_cast<acc_t*>(dynamic_shared());
  unsigned char* shared = dynamic_shared() + tiles_offset<acc_t>(n, blocks);
  resident_t* attn = reinterpret_cast<resident_t*>(dynamic_shared() + matrix_offset<value_t, acc_t>(n, blocks));
  const wpr::Rows rows = kCluster ? wpr::rows_of_rank(n, blocks) : wpr::Rows{0, n};
  const int end = rows.first + rows.count;

  const auto queries = in.queries(matrix / p.heads, matrix % p.heads, end);
  const auto keys = in.keys(matrix / p.heads, matrix % p.heads);
  const acc_t scale = static_cast<acc_t>(p.scale);
  tile::Fragment<acc_t, wpr::kThreads> terms;
  for (int first = rows.first; first < end; first += tile::kRows) {
    for (int column = 0; column < n; column += tile::kRows) {
      tile::product<kTf32>(shared, queries, first, keys, column, static_cast<int>(p.channels), in.vectors, terms);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first + terms.row(i);
        if (row >= end) continue;
        const acc_t shift = lse[matrix * n + row];
#pragma unroll
        for (int j = 0; j < terms.kGroups; ++j) {
          const int k = column + terms.column(j, i);
          if (k < n)
            attn[(row - rows.first) * n + k] =
                static_cast<resident_t>(qk::exponential(terms.value[j][i] * scale - shift));
        }
      }
    }
  }
  __syncthreads();  // the tiles have been read, the matrix is there
  // Rounding leaves rows that do not quite sum to 1; many iterations would make the scores drift.
  for (int row = threadIdx.x / kWarpSize; row < rows.count; row += wpr::kWarps) {
    acc_t sum = 0;
    for (int k = threadIdx.x % kWarpSize; k < n; k += kWarpSize) sum += to_acc<acc_t>(attn[row * n + k]);
    sum = warp_sum(sum);
    if (threadIdx.x % kWarpSize == 0) row_scale[row] = acc_t(1) / sum;
  }
  const wpr::Scratch<acc_t> scratch(shared, n);
  wpr::iterate<kCluster>(params, matrix, attn, rows, scratch, blocks, row_scale, start, out + matrix * n);
}

constexpr int kThreads = 256;

// ---- Some of the tokens ----
// Queries, then keys, of the tokens that are ranked; a thread copies one unit. Strides and channels count units.
// Positions are data, and the host does not wait to see them: the rows of a token that does not exist are zeros.
template <typename unit_t>
__global__ void __launch_bounds__(kThreads) take_kernel(WprQkParams params, const unit_t* q, const unit_t* k,
                                                        const int64_t* among,  // [batch, named]
                                                        unit_t* rows) {        // [2, batch, heads, tokens, channels]
  const QkParams& p = params.qk;
  const int64_t half = p.batch * p.heads * p.tokens * p.channels;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= 2 * half) return;
  const bool key = i >= half;
  const int64_t row = (key ? i - half : i) / p.channels;
  const int64_t place = row % p.tokens, matrix = row / p.tokens;
  const int64_t image = matrix / p.heads, head = matrix % p.heads;
  const int64_t token = place < params.num_prefix ? place : among[image * params.named() + place - params.num_prefix];
  unit_t unit = {};
  if (0 <= token && token < params.source_tokens) {
    const unit_t* from = key ? k + p.k_offset(image, head) + token * p.k_token_stride
                             : q + p.q_offset(image, head) + token * p.q_token_stride;
    unit = from[i % p.channels];
  }
  rows[i] = unit;
}

template <typename unit_t, typename value_t>
cudaError_t launch_take(WprQkParams params, const value_t* q, const value_t* k, const int64_t* among, value_t* rows,
                        cudaStream_t stream) {
  constexpr int64_t kValues = static_cast<int64_t>(sizeof(unit_t) / sizeof(value_t));
  QkParams& p = params.qk;
  for (int64_t* count : {&p.channels, &p.q_batch_stride, &p.q_head_stride, &p.q_token_stride, &p.k_batch_stride,
                         &p.k_head_stride, &p.k_token_stride}) {
    *count /= kValues;
  }
  const int64_t units = 2 * p.batch * p.heads * p.tokens * p.channels;
  return launch(take_kernel<unit_t>, static_cast<unsigned>(ceil_div<int64_t>(units, kThreads)), kThreads, 0, stream,
                params, reinterpret_cast<const unit_t*>(q), reinterpret_cast<const unit_t*>(k), among,
                reinterpret_cast<unit_t*>(rows));
}

// The operands of the tokens at `among`, or of all where it is null. Moves 16 bytes a thread where rows and pointers
// are aligned to that, else single values.
template <typename value_t>
cudaError_t take(const WprQkParams& params, const value_t* q, const value_t* k, const int64_t* among, value_t* rows,
                 cudaStream_t stream, qk::Operands<value_t>* in) {
  *in = qk::operands(params.qk, q, k);
  if (!among) return cudaSuccess;
  const cudaError_t error = in->vectors ? launch_take<uint4>(params, q, k, among, rows, stream)
                                        : launch_take<value_t>(params, q, k, among, rows, stream);
  QkParams taken = params.qk;
  taken.q_token_stride = taken.k_token_stride = taken.channels;
  taken.q_head_stride = taken.k_head_stride = taken.tokens * taken.channels;
  taken.q_batch_stride = taken.k_batch_stride = taken.heads * taken.q_head_stride;
  *in = qk::operands<value_t>(taken, rows, rows + taken.batch * taken.q_batch_stride);
  return error;
}

// ---- Formed again in every iteration ----

template <typename acc_t>
__global__ void __launch_bounds__(kThreads) start_kernel(WprParams params, const acc_t* start,
                                                         acc_t* scores,  // [matrices, n]
                                                         int* active) {  // [matrices]
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.matrices * params.tokens) return;
  const int64_t matrix = i / params.tokens, k = i % params.tokens;
  scores[i] = start ? start[matrix * params.start_stride + k] : acc_t(1);
  if (k == 0) active[matrix] = 1;
}

// Ends an iteration of one matrix: adds the tiles' sums up, and sees whether the scores still change.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) advance_kernel(WprParams params, int64_t row_tiles,
                                                           const acc_t* partial,  // [matrices, row_tiles, n]
                                                           acc_t* scores,         // [matrices, n]
                                                           int* active) {         // [matrices]
  TOKENPRUNE_SHARED(acc_t, scratch, kThreads / kWarpSize);
  const int64_t matrix = blockIdx.x;
  if (active[matrix] == 0) return;  // the whole block
  acc_t change = 0;
  for (int64_t k = threadIdx.x; k < params.tokens; k += kThreads) {
    acc_t& score = scores[matrix * params.tokens + k];
    const acc_t next = qk::tile_total(partial, matrix, row_tiles, params.tokens, k);
    const acc_t off = next - score;
    change += off < 0 ? -off : off;
    score = next;
  }
  change = block_sum<kThreads>(change, scratch);
  if (threadIdx.x == 0 && change <= static_cast<acc_t>(params.threshold)) active[matrix] = 0;
}

}  // namespace wpr_qk

// In how many blocks' shared memory a matrix lies on the current device; in none, it is formed in every iteration.
template <typename value_t, typename acc_t>
cudaError_t wpr_qk_blocks(const WprQkParams& params, int* blocks) {
  const auto bytes = [&](int count) { return wpr_qk::resident_bytes<value_t, acc_t>(params.qk.tokens, count); };
  const auto kernel = reinterpret_cast<const void*>(wpr_qk::resident_kernel<false, true, value_t, acc_t>);
  return blocks_that_hold(bytes, kernel, wpr::kThreads, blocks);
}

// Numbers of the workspace: the lse and, unless matrices are held, the sums of the tiles.
inline int64_t wpr_qk_workspace(const WprQkParams& params, int blocks) {
  return params.wpr.matrices * params.qk.tokens * (1 + (blocks > 0 ? 0 : qk::row_tiles(0, params.qk.tokens)));
}

// Numbers that a copy of the ranked tokens' queries and keys takes.
inline int64_t wpr_qk_rows(const WprQkParams& params) {
  return 2 * params.wpr.matrices * params.qk.tokens * params.qk.channels;
}

template <bool kTf32, typename value_t, typename acc_t>
cudaError_t launch_wpr_qk(const WprQkParams& params, int held_by, const value_t* q, const value_t* k,
                          const acc_t* start,
                          const int64_t* among,  // [batch, named], or null: all tokens
                          value_t* rows,         // of wpr_qk_rows; unused when all tokens are ranked
                          acc_t* workspace,
                          int* active,  // [matrices]; unused when blocks hold a matrix
                          acc_t* out, cudaStream_t stream) {
  const WprParams& wpr = params.wpr;
  if (wpr.matrices == 0) return cudaSuccess;
  qk::Operands<value_t> in;
  cudaError_t error = wpr_qk::take(params, q, k, among, rows, stream, &in);
  if (error != cudaSuccess) return error;
  acc_t* lse = workspace;
  error = qk::launch_lse<kTf32>(in, 0, wpr.tokens, lse, stream);
  if (error != cudaSuccess) return error;
  const auto matrices = static_cast<unsigned>(wpr.matrices);
  if (held_by > 0) {
    auto* kernel = held_by == 1 ? wpr_qk::resident_kernel<kTf32, false, value_t, acc_t>
                                : wpr_qk::resident_kernel<kTf32, true, value_t, acc_t>;
    return launch_clusters(held_by, kernel, matrices * held_by, wpr::kThreads,
                           wpr_qk::resident_bytes<value_t, acc_t>(wpr.tokens, held_by), stream, in, wpr, held_by, lse,
                           start, out);
  }
  acc_t* partial = lse + wpr.matrices * wpr.tokens;
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(wpr.matrices * wpr.tokens, wpr_qk::kThreads));
  error = launch(wpr_qk::start_kernel<acc_t>, blocks, wpr_qk::kThreads, 0, stream, wpr, start, out, active);
  const qk::Columns<acc_t> work{1, 0, wpr.tokens, lse, out, active, partial};
  for (int64_t iteration = 0; iteration < wpr.max_iters && error == cudaSuccess; ++iteration) {
    error = qk::launch_columns<kTf32, false>(in, work, stream);
    if (error != cudaSuccess) break;
    error = launch(wpr_qk::advance_kernel<acc_t>, matrices, wpr_qk::kThreads, 0, stream, wpr,
                   qk::row_tiles(0, wpr.tokens), partial, out, active);
  }
  return error;
}

}  // namespace tokenprune
