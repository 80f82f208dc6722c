// What csrc/cuda/kernels/device.cuh gives the kernels, with its documented meaning on the host. Also the built-in names
// of CUDA C++ that the kernels use. The types, 16-bit floats among them, are those of CUDA's own headers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <bit>
#include <cmath>
#include <cstring>

#include "../cuda/kernels/clusters.h"
#include "../cuda/kernels/record_launch.h"
#include "executor.h"
#include "matrix.h"
#include "races.h"

// A plain __shared__ would be a variable of each thread here: kernels use TOKENPRUNE_SHARED and dynamic_shared().
#undef __shared__
#define __shared__ static_assert(false, "use TOKENPRUNE_SHARED or dynamic_shared() of device.cuh");
#undef __launch_bounds__
#define __launch_bounds__(...)

#define SIMT_HERE const std::source_location where = std::source_location::current()

inline const uint3& threadIdx = simt::thread_index;
inline const uint3& blockIdx = simt::block_index;
inline const dim3& blockDim = simt::block_size;
inline const dim3& gridDim = simt::grid_size;

// ---- Barriers ----
inline void __syncthreads(SIMT_HERE) { simt::block_barrier("__syncthreads", false, where); }
inline int __syncthreads_count(int predicate, SIMT_HERE) {
  return simt::block_barrier("__syncthreads_count", predicate != 0, where);
}
inline int __syncthreads_or(int predicate, SIMT_HERE) {
  return simt::block_barrier("__syncthreads_or", predicate != 0, where) > 0;
}
inline int __syncthreads_and(int predicate, SIMT_HERE) {
  return simt::block_barrier("__syncthreads_and", predicate == 0, where) == 0;
}
inline void __syncwarp(unsigned mask = simt::kAllLanes, SIMT_HERE) {
  simt::warp_call("__syncwarp", mask, nullptr, nullptr, true, where);
}

// ---- Shuffles and votes ----
namespace simt {

template <typename T>
struct ShuffleSlot {
  T value;
  int source;  // a lane
};

template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source, const std::source_location& where) {
  ShuffleSlot<T> slot{value, source};
  warp_call(
      name, mask, &slot,
      [](void* const slots[], unsigned lanes, const std::source_location& place) {
        T results[kLanes];
        for (int l = 0; l < kLanes; ++l) {
          if (!(lanes >> l & 1)) continue;
          const int from = static_cast<ShuffleSlot<T>*>(slots[l])->source;
          if (!(lanes >> from & 1)) {
            fail("a shuffle reads lane " + std::to_string(from) + ", which does not take part", place);
          }
          results[l] = static_cast<ShuffleSlot<T>*>(slots[from])->value;
        }
        for (int l = 0; l < kLanes; ++l) {
          if (lanes >> l & 1) static_cast<ShuffleSlot<T>*>(slots[l])->value = results[l];
        }
      },
      false, where);
  return slot.value;
}

inline int in_segment(int source, int width) { return lane() / width * width + source; }

inline unsigned ballot(const char* name, unsigned mask, bool predicate, const std::source_location& where) {
  unsigned slot = predicate;
  warp_call(
      name, mask, &slot,
      [](void* const slots[], unsigned lanes, const std::source_location&) {
        unsigned votes = 0;
        for (int l = 0; l < kLanes; ++l) {
          if (lanes >> l & 1) votes |= *static_cast<unsigned*>(slots[l]) << l;
        }
        for (int l = 0; l < kLanes; ++l) {
          if (lanes >> l & 1) *static_cast<unsigned*>(slots[l]) = votes;
        }
      },
      false, where);
  return slot;
}

}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = simt::kLanes, SIMT_HERE) {
  return simt::shuffle("__shfl_sync", mask, value, simt::in_segment(source & (width - 1), width), where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = simt::kLanes, SIMT_HERE) {
  const int source = simt::lane() ^ bits;
  const bool inside = source / width <= simt::lane() / width;
  return simt::shuffle("__shfl_xor_sync", mask, value, inside ? source : simt::lane(), where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = simt::kLanes, SIMT_HERE) {
  const int source = simt::lane() % width - static_cast<int>(delta);
  return simt::shuffle("__shfl_up_sync", mask, value, source < 0 ? simt::lane() : simt::in_segment(source, width),
                       where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = simt::kLanes, SIMT_HERE) {
  const int source = simt::lane() % width + static_cast<int>(delta);
  return simt::shuffle("__shfl_down_sync", mask, value,
                       source >= width ? simt::lane() : simt::in_segment(source, width), where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_HERE) {
  return simt::ballot("__ballot_sync", mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, SIMT_HERE) {
  return simt::ballot("__any_sync", mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_HERE) {
  return simt::ballot("__all_sync", mask, predicate != 0, where) == mask;
}

// ---- Single-thread intrinsics ----
template <typename T, typename F>
__attribute__((no_sanitize("thread"), noinline)) T simt_atomic(T* memory, F update) {
  simt::races::atomic(memory, sizeof(T), __builtin_return_address(0));
  const T old = *memory;
  *memory = update(old);
  return old;
}
template <typename T>
T atomicAdd(T* memory, T value) {
  static_assert(std::is_integral_v<T>, "sums of floating numbers would depend on the order of the threads");
  return simt_atomic(memory, [&](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* memory, T value) {
  return simt_atomic(memory, [&](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* memory, T value) {
  return simt_atomic(memory, [&](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicCAS(T* memory, T expected, T value) {
  return simt_atomic(memory, [&](T old) { return old == expected ? value : old; });
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bits)) + 1; }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }

// ---- device.cuh ----
#define TOKENPRUNE_SHARED(type, name, count) \
  static const char name##_key = 0;          \
  type* const name = static_cast<type*>(simt::static_shared(&name##_key, sizeof(type) * (count)))

namespace tokenprune {

inline unsigned char* dynamic_shared() { return static_cast<unsigned char*>(simt::dynamic_shared()); }

inline void cp_async_16(void* to, const void* from, bool valid, SIMT_HERE) {
  simt::copy_async(to, from, 16, valid ? 16 : 0, where);
}
inline void cp_async_commit() { simt::commit_copies(); }
template <int kLeft>
void cp_async_wait() {
  simt::wait_for_copies(kLeft);
}

template <typename value_t>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_HERE) {
  simt::Fragments<16, simt::Packed<value_t>>::multiply("mma.m16n8k16", d, a, b0, b1, where);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_HERE) {
  simt::Fragments<8, simt::Tf32>::multiply("mma.m16n8k8.tf32", d, a, b0, b1, where);
}
inline uint32_t to_tf32(float value) { return simt::Tf32::round(value); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_HERE) { simt::load_matrices(r, row, where); }

inline int cluster_rank() { return simt::cluster_rank(); }
inline void cluster_barrier(SIMT_HERE) { simt::cluster_barrier("cluster_barrier", where); }
template <typename T>
T cluster_read(const T* shared, int rank, SIMT_HERE) {
  return *static_cast<const T*>(simt::in_cluster(shared, rank, where));
}

inline float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(int blocks, void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes,
                            cudaStream_t, Arguments... arguments) {
  const void* const address = reinterpret_cast<const void*>(kernel);
  cudaError_t error = ask_for_shared(address, shared_bytes);
  bool allowed = true;
  if (error == cudaSuccess && blocks > 1) error = runs_in_clusters(address, blocks, threads, shared_bytes, &allowed);
  if (error != cudaSuccess) return error;
  if (!allowed || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  bool execute = true;
  error = record_launch(address, grid, threads, shared_bytes, &execute);
  if (error != cudaSuccess || !execute) return error;
  simt::run(grid, dim3(threads), shared_bytes, blocks, [=] { kernel(static_cast<Parameters>(arguments)...); });
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  return launch_clusters(1, kernel, grid, threads, shared_bytes, stream, arguments...);
}

}  // namespace tokenprune
