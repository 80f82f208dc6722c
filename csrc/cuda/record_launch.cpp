#include "kernels/record_launch.h"

#include "../launches.h"

namespace tokenprune {
namespace {

// Of the thread: what other threads launch at the same time is not part of what is measured.
thread_local LaunchRecord* current = nullptr;

}  // namespace

cudaError_t record_launch(const void* kernel, dim3 grid, int threads, int64_t shared_bytes, bool* execute) {
  *execute = !current || current->execute;
  if (!current) return cudaSuccess;
  Launch launch = {nullptr, {grid.x, grid.y, grid.z}, threads, 0, 0, shared_bytes, 0, 0};
  cudaFuncAttributes attributes = {};
  int device = 0;
  cudaError_t error = cudaFuncGetName(&launch.kernel, kernel);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&launch.blocks_per_sm, kernel, threads, shared_bytes);
  }
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&launch.num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  launch.registers = attributes.numRegs;
  launch.static_shared = static_cast<int64_t>(attributes.sharedSizeBytes);
  current->launches.push_back(launch);
  return cudaSuccess;
}

}  // namespace tokenprune

__attribute__((visibility("default"))) tokenprune::LaunchRecord* tokenprune_record_launches(
    tokenprune::LaunchRecord* record) {
  tokenprune::LaunchRecord* before = tokenprune::current;
  tokenprune::current = record;
  return before;
}
