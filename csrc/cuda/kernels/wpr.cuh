// Weighted page rank, s <- A^T s: all iterations and the test for convergence run inside one launch. A matrix that fits
// is staged in shared memory and read from device memory once: in that of one block, or, on devices with clusters, its
// rows spread over the blocks of one. A larger matrix is read again every iteration, by one block.
#pragma once

#include <utility>

#include "../../ops/wpr_params.h"
#include "common.cuh"

namespace tokenprune {
namespace wpr {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPerLane = 8;                     // columns a lane sums at a time
constexpr int kColumns = kPerLane * kWarpSize;  // columns a block sums at a time

// Where an iteration keeps its numbers, in shared memory unless a member is pointed elsewhere.
template <typename acc_t>
struct Scratch {
  acc_t* partial;    // [kWarps, kColumns], one column tile of the warps' sums
  acc_t* warp_sums;  // [kWarps]
  acc_t* s;          // [n], the scores before and after an iteration
  acc_t* next;       // [n]
  acc_t* own;        // [2, n], the sums of this block's rows for the others of a cluster; in turns, so that one barrier
                     // an iteration is enough: whoever passes the next one has read the last sums

  __device__ Scratch(unsigned char* memory, int n)
      : partial(reinterpret_cast<acc_t*>(memory)),
        warp_sums(partial + kWarps * kColumns),
        s(warp_sums + kWarps),
        next(s + n),
        own(next + n) {}
};
// Of all members, or of those that do not grow with the tokens.
template <typename acc_t>
constexpr int64_t fixed_scratch_bytes() {
  return (kWarps * kColumns + kWarps) * static_cast<int64_t>(sizeof(acc_t));
}
template <typename acc_t>
constexpr int64_t scratch_bytes(int64_t tokens, int blocks) {
  return fixed_scratch_bytes<acc_t>() + (blocks > 1 ? 4 : 2) * tokens * static_cast<int64_t>(sizeof(acc_t));
}

// Rows of a matrix that a block holds.
struct Rows {
  int first;
  int count;
};

// Those of a block of a cluster; the last ranks may have fewer than the others, or none.
__device__ inline Rows rows_of_rank(int n, int blocks) {
  const int most = static_cast<int>(rows_of_block(n, blocks));
  const int first = cluster_rank() * most;
  if (first >= n) return {n, 0};
  return {first, first + most < n ? most : n - first};
}

// sums = A^T s over some rows of A. Each warp walks over rows, its lanes over the columns; the warps' sums are then
// added in order. Calls done(column, sum); ends with a barrier.
template <typename value_t, typename acc_t, typename Done>
__device__ void multiply(const value_t* attn,  // [rows.count, n]
                         Rows rows, int n,
                         const acc_t* s,          // [n]
                         const acc_t* row_scale,  // [rows.count], or null: ones
                         acc_t* partial, Done done) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  for (int tile = 0; tile < n; tile += kColumns) {
    acc_t sums[kPerLane] = {};
    for (int r = warp; r < rows.count; r += kWarps) {
      const acc_t weight = row_scale ? s[rows.first + r] * row_scale[r] : s[rows.first + r];
      const value_t* row = attn + static_cast<int64_t>(r) * n;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int k = tile + j * kWarpSize + lane;
        if (k < n) sums[j] += weight * to_acc<acc_t>(row[k]);
      }
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) partial[warp * kColumns + j * kWarpSize + lane] = sums[j];
    __syncthreads();
    for (int c = threadIdx.x; c < kColumns && tile + c < n; c += kThreads) {
      done(tile + c, column_total<kWarps, kColumns>(partial, c));
    }
    __syncthreads();
  }
}

// All iterations of a matrix [n, n], by the block that holds it, or by the blocks of a cluster that hold it together.
// Begins and ends with barriers.
template <bool kCluster, typename value_t, typename acc_t>
__device__ void iterate(const WprParams& params, int64_t matrix,
                        const value_t* attn,  // [rows.count, n]
                        Rows rows, Scratch<acc_t> scratch, int blocks,
                        const acc_t* row_scale,  // [rows.count] factors of the rows, or null: ones
                        const acc_t* start,      // [n], [matrices, n] or null: ones
                        acc_t* out) {            // [n]
  const int n = static_cast<int>(params.tokens);
  acc_t* s = scratch.s;
  acc_t* next = scratch.next;
  for (int k = threadIdx.x; k < n; k += kThreads) s[k] = start ? start[matrix * params.start_stride + k] : acc_t(1);
  __syncthreads();

  const acc_t threshold = static_cast<acc_t>(params.threshold);
  for (int64_t iteration = 0; iteration < params.max_iters; ++iteration) {
    acc_t change = 0;
    const auto advance = [&](int k, acc_t sum) {
      const acc_t off = sum - s[k];
      change += off < 0 ? -off : off;
      next[k] = sum;
    };
    if constexpr (kCluster) {
      acc_t* own = scratch.own + iteration % 2 * n;
      multiply(attn, rows, n, s, row_scale, scratch.partial, [&](int k, acc_t sum) { own[k] = sum; });
      cluster_barrier();
      for (int k = threadIdx.x; k < n; k += kThreads) {
        acc_t sum = 0;
        for (int rank = 0; rank < blocks; ++rank) sum += cluster_read(own + k, rank);
        advance(k, sum);
      }
    } else {
      multiply(attn, rows, n, s, row_scale, scratch.partial, advance);
    }
    change = block_sum<kThreads>(change, scratch.warp_sums);  // the same in all blocks: they add in the same order
    std::swap(s, next);
    if (change <= threshold) break;  // the same for every thread
  }
  if constexpr (kCluster) cluster_barrier();  // others may still read what is here
  if (s != out && (!kCluster || cluster_rank() == 0)) {
    for (int k = threadIdx.x; k < n; k += kThreads) out[k] = s[k];
  }
}

// Where a staged matrix begins in shared memory, and how much it needs with all before it.
template <typename acc_t>
constexpr int64_t staged_offset(int64_t tokens, int blocks) {
  return ceil_div<int64_t>(scratch_bytes<acc_t>(tokens, blocks), 16) * 16;
}
template <typename value_t, typename acc_t>
constexpr int64_t staged_bytes(int64_t tokens, int blocks) {
  return staged_offset<acc_t>(tokens, blocks) + copied_bytes<value_t>(rows_of_block(tokens, blocks) * tokens);
}

template <typename value_t, typename acc_t, bool kStaged, bool kCluster>
__global__ void __launch_bounds__(kThreads) kernel(WprParams params, int blocks,
                                                   const value_t* attn,  // [matrices, n, n]
                                                   const acc_t* start,   // [n], [matrices, n] or null: ones
                                                   acc_t* workspace,     // [matrices, n]; unused when staged
                                                   acc_t* out) {         // [matrices, n]
  const int n = static_cast<int>(params.tokens);
  const int64_t matrix = kCluster ? blockIdx.x / blocks : blockIdx.x;
  const Rows rows = kCluster ? rows_of_rank(n, blocks) : Rows{0, n};
  attn += (matrix * n + rows.first) * n;
  out += matrix * n;

  Scratch<acc_t> scratch(dynamic_shared(), n);
  if constexpr (kStaged) {
    unsigned char* to = dynamic_shared() + staged_offset<acc_t>(n, blocks);
    attn = copy_to_shared<kThreads>(to, attn, static_cast<int64_t>(rows.count) * n);
  } else {
    scratch.s = out;
    scratch.next = workspace + matrix * n;
  }
  iterate<kCluster>(params, matrix, attn, rows, scratch, blocks, static_cast<const acc_t*>(nullptr), start, out);
}

}  // namespace wpr

// In how many blocks' shared memory a matrix lies on the current device; in none, a workspace is needed.
template <typename value_t, typename acc_t>
cudaError_t wpr_blocks(const WprParams& params, int* blocks) {
  const auto bytes = [&](int count) { return wpr::staged_bytes<value_t, acc_t>(params.tokens, count); };
  const auto kernel = reinterpret_cast<const void*>(wpr::kernel<value_t, acc_t, true, true>);
  return blocks_that_hold(bytes, kernel, wpr::kThreads, blocks);
}

template <typename value_t, typename acc_t>
cudaError_t launch_wpr(const WprParams& params, int blocks, const value_t* attn, const acc_t* start, acc_t* workspace,
                       acc_t* out, cudaStream_t stream) {
  if (params.matrices == 0) return cudaSuccess;
  const int64_t bytes =
      blocks > 0 ? wpr::staged_bytes<value_t, acc_t>(params.tokens, blocks) : wpr::fixed_scratch_bytes<acc_t>();
  auto* kernel = blocks == 0   ? wpr::kernel<value_t, acc_t, false, false>
                 : blocks == 1 ? wpr::kernel<value_t, acc_t, true, false>
                               : wpr::kernel<value_t, acc_t, true, true>;
  const int cluster = blocks > 1 ? blocks : 1;
  return launch_clusters(cluster, kernel, static_cast<unsigned>(params.matrices * cluster), wpr::kThreads, bytes,
                         stream, params, blocks, attn, start, workspace, out);
}

}  // namespace tokenprune
