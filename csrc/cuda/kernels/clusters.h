// Launches in clusters: blocks that run at the same time and read each other's shared memory (sm_90 and later).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tokenprune {

// A launch in clusters of so many blocks along x.
struct ClusterLaunch {
  cudaLaunchAttribute cluster = {};
  cudaLaunchConfig_t config = {};

  ClusterLaunch(int blocks, dim3 grid, int threads, int64_t shared_bytes, cudaStream_t stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(blocks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = blocks > 1 ? 1 : 0;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;
};

// Before a kernel gets more than the 48 KiB of shared memory that need no asking.
inline cudaError_t ask_for_shared(const void* kernel, int64_t bytes) {
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (bytes <= kWithoutAsking) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// Whether the current device, which has clusters, runs the kernel in such: not when its code is that of a device that
// has none, compiled anew from PTX, nor where a device is divided into parts and this one is too small.
inline cudaError_t runs_in_clusters(const void* kernel, int blocks, int threads, int64_t shared_bytes, bool* runs) {
  *runs = false;
  cudaFuncAttributes attributes = {};
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess || attributes.ptxVersion < 90) return error;
  error = ask_for_shared(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  const ClusterLaunch launch(blocks, dim3(static_cast<unsigned>(blocks)), threads, shared_bytes, nullptr);
  int clusters = 0;
  error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config);
  if (error == cudaErrorInvalidClusterSize) {
    cudaGetLastError();  // it is an answer: nobody should find an error later
    return cudaSuccess;
  }
  *runs = clusters > 0;
  return error;
}

}  // namespace tokenprune
