// Weighted page rank, s <- A^T s, one block for each matrix: all iterations and the test for convergence run inside one
// launch. A matrix that fits is staged in shared memory and read from device memory once; a larger one is read again
// every iteration.
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

// The scores before and after an iteration, one column tile of partial sums, one value a warp.
template <typename acc_t>
constexpr int64_t staged_scores_bytes(int64_t tokens) {
  return 2 * tokens * static_cast<int64_t>(sizeof(acc_t));
}
template <typename acc_t>
constexpr int64_t scratch_bytes() {
  return (kWarps * kColumns + kWarps) * static_cast<int64_t>(sizeof(acc_t));
}

// One step next = A^T s; returns this thread's part of sum |next - s|. Each warp walks over rows, its lanes over the
// columns; the warps' sums are then added in order.
template <typename value_t, typename acc_t>
__device__ acc_t step(const value_t* attn,  // [n, n]
                      int n,
                      const acc_t* s,  // [n]
                      acc_t* next,     // [n]
                      acc_t* partial,
                      const acc_t* row_scale) {  // [n], or null: ones
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  acc_t change = 0;
  for (int tile = 0; tile < n; tile += kColumns) {
    acc_t sums[kPerLane] = {};
    for (int q = warp; q < n; q += kWarps) {
      const acc_t weight = row_scale ? s[q] * row_scale[q] : s[q];
      const value_t* row = attn + static_cast<int64_t>(q) * n;
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
      const acc_t total = column_total<kWarps, kColumns>(partial, c);
      const acc_t off = total - s[tile + c];
      change += off < 0 ? -off : off;
      next[tile + c] = total;
    }
    __syncthreads();
  }
  return change;
}

// Where a staged matrix begins in shared memory, and how much it needs with all before it.
template <typename acc_t>
constexpr int64_t staged_offset(int64_t tokens) {
  return ceil_div<int64_t>(scratch_bytes<acc_t>() + staged_scores_bytes<acc_t>(tokens), 16) * 16;
}
template <typename value_t, typename acc_t>
constexpr int64_t staged_bytes(int64_t tokens) {
  return staged_offset<acc_t>(tokens) + copied_bytes<value_t>(tokens * tokens);
}

// The shared memory of an iteration, staged_scores_bytes + scratch_bytes in this order.
template <typename acc_t>
struct Scratch {
  __device__ Scratch(acc_t* memory, int n)
      : partial(memory), warp_sums(partial + kWarps * kColumns), s(warp_sums + kWarps), next(s + n) {}
  acc_t* partial;
  acc_t* warp_sums;
  acc_t* s;     // the scores before and after an iteration: in shared memory,
  acc_t* next;  // unless the caller points them elsewhere
};

// All iterations of the block's matrix [n, n]. Begins and ends with barriers.
template <typename value_t, typename acc_t>
__device__ void iterate(const WprParams& params, const value_t* attn, Scratch<acc_t> scratch,
                        const acc_t* row_scale,  // [n] factors of the rows, or null: ones
                        const acc_t* start,      // [n], [matrices, n] or null: ones
                        acc_t* out) {            // [n]
  const int n = static_cast<int>(params.tokens);
  const int64_t matrix = blockIdx.x;
  acc_t* s = scratch.s;
  acc_t* next = scratch.next;
  for (int k = threadIdx.x; k < n; k += kThreads) s[k] = start ? start[matrix * params.start_stride + k] : acc_t(1);
  __syncthreads();

  const acc_t threshold = static_cast<acc_t>(params.threshold);
  for (int64_t iteration = 0; iteration < params.max_iters; ++iteration) {
    const acc_t change = block_sum<kThreads>(step(attn, n, s, next, scratch.partial, row_scale), scratch.warp_sums);
    std::swap(s, next);
    if (change <= threshold) break;  // the same for every thread
  }
  if (s != out) {
    for (int k = threadIdx.x; k < n; k += kThreads) out[k] = s[k];
  }
}

template <typename value_t, typename acc_t, bool kStaged>
__global__ void __launch_bounds__(kThreads) kernel(WprParams params,
                                                   const value_t* attn,  // [matrices, n, n]
                                                   const acc_t* start,   // [n], [matrices, n] or null: ones
                                                   acc_t* workspace,     // [matrices, n]; unused when staged
                                                   acc_t* out) {         // [matrices, n]
  const int n = static_cast<int>(params.tokens);
  const int64_t matrix = blockIdx.x;
  attn += matrix * n * n;
  out += matrix * n;

  Scratch<acc_t> scratch(reinterpret_cast<acc_t*>(dynamic_shared()), n);
  if constexpr (kStaged) {
    attn = copy_to_shared<kThreads>(dynamic_shared() + staged_offset<acc_t>(n), attn, static_cast<int64_t>(n) * n);
  } else {
    scratch.s = out;
    scratch.next = workspace + matrix * n;
  }
  iterate<value_t, acc_t>(params, attn, scratch, nullptr, start, out);
}

}  // namespace wpr

// Whether a matrix is staged in shared memory on the current device: then no workspace is needed.
template <typename value_t, typename acc_t>
cudaError_t wpr_fits(const WprParams& params, bool* fits) {
  return fits_shared_memory(wpr::staged_bytes<value_t, acc_t>(params.tokens), fits);
}

template <typename value_t, typename acc_t>
cudaError_t launch_wpr(const WprParams& params, bool fits, const value_t* attn, const acc_t* start, acc_t* workspace,
                       acc_t* out, cudaStream_t stream) {
  if (params.matrices == 0) return cudaSuccess;
  auto* kernel = fits ? wpr::kernel<value_t, acc_t, true> : wpr::kernel<value_t, acc_t, false>;
  const int64_t bytes = fits ? wpr::staged_bytes<value_t, acc_t>(params.tokens) : wpr::scratch_bytes<acc_t>();
  return launch(kernel, static_cast<unsigned>(params.matrices), wpr::kThreads, bytes, stream, params, attn, start,
                workspace, out);
}

}  // namespace tokenprune
