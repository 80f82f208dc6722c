// Sampling at quantiles and the copies in one launch. As in gather.cuh, the blocks that share an image sample each for
// itself. Shared memory holds the sums of an image in float64: some 12 000 tokens of it on the smallest device.
#pragma once

#include <cmath>

#include "../../ops/quantile_gather_params.h"
#include "gather.cuh"

namespace tokenprune {
namespace quantile {

using select::kThreads;

// Running sums of every run of kRun tokens, and behind each the sum of all runs up to it. A run then begins at an odd
// distance, so that threads with a run each do not meet in a bank.
struct Sums {
  double* values;  // [runs, kRun + 1]

  __device__ double& in_run(int i) const { return values[i + i / kRun]; }
  __device__ double& of_runs(int run) const { return values[run * (kRun + 1) + kRun]; }
  __device__ double up_to(int i) const { return (i < kRun ? 0.0 : of_runs(i / kRun - 1)) + in_run(i); }
};

// The sums of n scores; the last of them is returned.
template <typename score_t>
__device__ double form_sums(const score_t* scores, int n, const Sums& sums) {
  const int runs = ceil_div(n, kRun);
  for (int i = threadIdx.x; i < runs * kRun; i += kThreads) {
    sums.in_run(i) = i < n ? weight(static_cast<double>(scores[i])) : 0.0;
  }
  __syncthreads();
  for (int run = threadIdx.x; run < runs; run += kThreads) {
    double sum = 0;
#pragma unroll 4
    for (int i = run * kRun; i < (run + 1) * kRun; ++i) sums.in_run(i) = sum += sums.in_run(i);
    sums.of_runs(run) = sum;
  }
  __syncthreads();
  if (threadIdx.x < kWarpSize) {  // in order, and from registers
    double sum = 0;
    for (int base = 0; base < runs; base += kWarpSize) {
      const int run = base + threadIdx.x;
      const double own = run < runs ? sums.of_runs(run) : 0.0;
      double up_to = 0;
#pragma unroll 8
      for (int lane = 0; lane < kWarpSize; ++lane) {
        sum += __shfl_sync(0xffffffffu, own, lane);
        if (lane == static_cast<int>(threadIdx.x)) up_to = sum;
      }
      if (run < runs) sums.of_runs(run) = up_to;
    }
  }
  __syncthreads();
  return sums.of_runs(runs - 1);
}

// Whether a quantile falls on token i: one that its sum reaches and the sum before it does not.
__device__ inline bool is_sampled(const Sums& sums, int i, double total, int keep) {
  int reached = 0;
  if (i > 0) {
    const double before = sums.up_to(i - 1);
    for (int most = keep; reached < most;) {
      const int k = (reached + most + 1) / 2;
      if (reaches(before, total, k, keep)) {
        reached = k;
      } else {
        most = k - 1;
      }
    }
  }
  return reached < keep && reaches(sums.up_to(i), total, reached + 1, keep);
}

// Sets bit i of `bits` where token i of n is sampled; returns how many are. A barrier inside comes last.
template <typename score_t>
__device__ int sample(const score_t* scores, int n, int keep, const Sums& sums, unsigned* bits) {
  const double total = form_sums(scores, n, sums);
  int count = 0;
  for (int base = 0; base < n; base += kThreads) {
    const int i = base + threadIdx.x;
    const bool hit = i < n && is_sampled(sums, i, total, keep);
    const unsigned hits = __ballot_sync(0xffffffffu, hit);
    if (i < n && i % kWarpSize == 0) bits[i / kWarpSize] = hits;
    count += __syncthreads_count(hit);
  }
  return count;
}

// Bytes of shared memory: the sums, the positions of those that leave, and a bit for everyone, whether it is sampled.
constexpr int64_t sums_bytes(int64_t n) {
  return ceil_div<int64_t>(n, kRun) * (kRun + 1) * static_cast<int64_t>(sizeof(double));
}
constexpr int64_t shared_bytes(int64_t n, int64_t keep) {
  return sums_bytes(n) + keep * static_cast<int64_t>(sizeof(int32_t)) +
         ceil_div<int64_t>(n, kWarpSize) * static_cast<int64_t>(sizeof(unsigned));
}

template <typename unit_t, typename value_t, typename acc_t, typename score_t>
__global__ void __launch_bounds__(kThreads) kernel(TopkGatherParams params,
                                                   const value_t* x,       // [batch, tokens, channels]
                                                   const score_t* scores,  // [batch, tokens]
                                                   value_t* out,           // [batch, tokens_out, channels]
                                                   int64_t* index,         // [batch, keep]
                                                   acc_t* sizes,           // [batch, tokens_out]
                                                   value_t* log_sizes) {   // [batch, tokens_out]
  const int n = static_cast<int>(params.tokens - params.num_prefix);
  const Sums sums{reinterpret_cast<double*>(dynamic_shared())};
  int32_t* order = reinterpret_cast<int32_t*>(dynamic_shared() + sums_bytes(n));  // [keep]
  unsigned* bits = reinterpret_cast<unsigned*>(order + params.keep);              // [n / 32]
  const int64_t image = blockIdx.x;
  const int count =
      sample(scores + image * params.tokens + params.num_prefix, n, static_cast<int>(params.keep), sums, bits);

  const int64_t rows = params.tokens_out();
  const bool writes = blockIdx.y == 0;
  const auto write_size = [&](int64_t row, bool counts) {
    sizes[image * rows + row] = counts ? acc_t(1) : acc_t(0);
    log_sizes[image * rows + row] = from_acc<value_t>(counts ? 0.0f : -INFINITY);
  };
  for (int64_t row = threadIdx.x; writes && row < params.num_prefix; row += kThreads) write_size(row, true);
  const auto sampled = [&](int64_t i) { return bits[i / kWarpSize] >> (i % kWarpSize) & 1; };  // 1 or 0
  const select::Threshold<unsigned> fill_up{0, params.keep - count};
  select::sweep(n, fill_up, sampled, [&](int64_t i, int64_t place, bool stays) {
    if (!stays) return;
    order[place] = static_cast<int32_t>(i + params.num_prefix);
    if (!writes) return;
    index[image * params.keep + place] = i + params.num_prefix;
    write_size(params.num_prefix + place, sampled(i) == 1);
  });
  __syncthreads();
  x += image * params.tokens * params.channels;
  out += image * rows * params.channels;
  const int64_t units = params.channels * static_cast<int64_t>(sizeof(value_t)) / static_cast<int64_t>(sizeof(unit_t));
  gather::copy_tokens(params, units, reinterpret_cast<const unit_t*>(x), order, reinterpret_cast<unit_t*>(out));
}

}  // namespace quantile

// Copies in units of 16 bytes where rows and pointers allow it.
template <typename acc_t, typename value_t, typename score_t>
cudaError_t launch_quantile_gather(const TopkGatherParams& params, const value_t* x, const score_t* scores,
                                   value_t* out, int64_t* index, acc_t* sizes, value_t* log_sizes,
                                   cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  int64_t parts = 0;
  const cudaError_t error = gather::count_parts(params, &parts);
  if (error != cudaSuccess) return error;
  const bool aligned = can_copy_vectors(x, {params.channels}) && can_copy_vectors(out, {params.channels});
  auto* kernel =
      aligned ? quantile::kernel<uint4, value_t, acc_t, score_t> : quantile::kernel<value_t, value_t, acc_t, score_t>;
  const dim3 grid(static_cast<unsigned>(params.batch), static_cast<unsigned>(parts));
  const int64_t bytes = quantile::shared_bytes(params.tokens - params.num_prefix, params.keep);
  return launch(kernel, grid, quantile::kThreads, bytes, stream, params, x, scores, out, index, sizes, log_sizes);
}

}  // namespace tokenprune
