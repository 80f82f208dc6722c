// What launch() of device.cuh calls first. csrc/launches.h has the other side.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tokenprune {

// Records the launch if this thread's launches are recorded. `*execute` says whether the kernel is to be run.
cudaError_t record_launch(const void* kernel, dim3 grid, int threads, int64_t shared_bytes, bool* execute);

}  // namespace tokenprune
