// What the kernels share: conversions, reductions over a block, sizes. No torch.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "clusters.h"
#include "device.cuh"

namespace tokenprune {

constexpr int kWarpSize = 32;

template <typename T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <typename acc_t>
__device__ inline acc_t to_acc(float value) {
  return value;
}
template <typename acc_t>
__device__ inline acc_t to_acc(double value) {
  return value;
}
template <typename acc_t>
__device__ inline acc_t to_acc(__half value) {
  return __half2float(value);
}
template <typename acc_t>
__device__ inline acc_t to_acc(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

template <typename value_t, typename acc_t>
__device__ inline value_t from_acc(acc_t value) {
  return static_cast<value_t>(value);
}

__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }

// Sum over the warp; every lane gets it.
template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Sum over the block in a fixed order, so that two runs give the same bits; every thread gets it. `scratch` holds one
// value a warp. Contains barriers: all threads of the block take part.
template <int kThreads, typename acc_t>
__device__ inline acc_t block_sum(acc_t value, acc_t* scratch) {
  constexpr int kWarps = kThreads / kWarpSize;
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  acc_t total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += scratch[w];
  __syncthreads();  // scratch may be written again
  return total;
}

// Column sums of what each warp has accumulated: warp w's sum of column c is partial[w * kColumns + c].
template <int kWarps, int kColumns, typename acc_t>
__device__ inline acc_t column_total(const acc_t* partial, int column) {
  acc_t total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += partial[w * kColumns + column];
  return total;
}

// The larger of two values; NaN wins, as in torch.
template <typename acc_t>
__device__ inline acc_t max_nan(acc_t a, acc_t b) {
  return (a != a || a > b) ? a : b;
}

// What one lane moves at a time.
template <typename value_t, int kCount>
struct alignas(sizeof(value_t) * kCount) Pack {
  value_t values[kCount];
};

// Whether rows can be moved 16 bytes at a time: the pointer, the channels, and every distance between rows, in numbers.
template <typename value_t>
bool can_copy_vectors(const value_t* data, std::initializer_list<int64_t> distances) {
  constexpr int64_t kPerCopy = 16 / static_cast<int64_t>(sizeof(value_t));
  bool aligned = reinterpret_cast<uint64_t>(data) % 16 == 0;
  for (const int64_t distance : distances) aligned = aligned && distance % kPerCopy == 0;
  return aligned;
}

// Shared memory for copy_to_shared(): `count` numbers, and room to begin where 16-byte copies are aligned.
template <typename value_t>
constexpr int64_t copied_bytes(int64_t count) {
  return count * static_cast<int64_t>(sizeof(value_t)) + 16;
}

// Copies `count` numbers that lie side by side to shared memory, 16 bytes at a time but for the ends, and returns where
// they begin. `base` is aligned to 16 bytes. For all threads of the block; a barrier has to follow.
template <int kThreads, typename value_t>
__device__ value_t* copy_to_shared(unsigned char* base, const value_t* from, int64_t count) {
  constexpr int64_t kPerCopy = 16 / static_cast<int64_t>(sizeof(value_t));
  const int64_t offset = static_cast<int64_t>(reinterpret_cast<uint64_t>(from) % 16 / sizeof(value_t));
  value_t* to = reinterpret_cast<value_t*>(base) + offset;
  const int64_t before = (kPerCopy - offset) % kPerCopy;
  const int64_t head = before < count ? before : count;
  const int64_t copies = (count - head) / kPerCopy;
  for (int64_t i = threadIdx.x; i < copies; i += kThreads) {
    cp_async_16(to + head + i * kPerCopy, from + head + i * kPerCopy, true);
  }
  cp_async_commit();
  for (int64_t i = threadIdx.x; i < head; i += kThreads) to[i] = from[i];
  for (int64_t i = head + copies * kPerCopy + threadIdx.x; i < count; i += kThreads) to[i] = from[i];
  cp_async_wait<0>();
  return to;
}

// The fewest blocks that hold something together when each of them has bytes(blocks) of shared memory: 1, or where the
// current device runs the kernel, which has so many threads, in clusters, 2, 4 or 8, the most that every such device
// can run; 0 when none do.
template <typename Bytes>
cudaError_t blocks_that_hold(Bytes bytes, const void* kernel, int threads, int* blocks) {
  int device = 0, limit = 0, clusters = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  const int most = clusters ? 8 : 1;
  *blocks = 1;
  while (*blocks <= most && bytes(*blocks) > limit) *blocks *= 2;
  bool run = *blocks <= most;
  if (error == cudaSuccess && run && *blocks > 1) {
    error = runs_in_clusters(kernel, *blocks, threads, bytes(*blocks), &run);
  }
  if (!run) *blocks = 0;
  return error;
}

// Rows of an n x n matrix that each of the blocks holds which hold it together, at most.
constexpr int64_t rows_of_block(int64_t n, int blocks) { return ceil_div<int64_t>(n, blocks); }

}  // namespace tokenprune
