// What the kernels share: conversions, reductions over a block, sizes. No torch.
#pragma once

#include <cstdint>

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

// Sum over the block in a fixed order, so that two runs give the same bits; every thread gets it. `scratch` holds one
// value a warp. Contains barriers: all threads of the block take part.
template <int kThreads, typename acc_t>
__device__ inline acc_t block_sum(acc_t value, acc_t* scratch) {
  constexpr int kWarps = kThreads / kWarpSize;
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
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

// Whether a block of the current device can have this much shared memory.
inline cudaError_t fits_shared_memory(int64_t bytes, bool* fits) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *fits = bytes <= limit;
  return error;
}

}  // namespace tokenprune
