// All that a kernel asks of the machine and plain C++ cannot say: shared memory, launches, asynchronous copies, tensor
// cores. Kernels are also compiled for the host, where csrc/simt/device.h stands in for this file and a test runs them
// thread by thread.
#pragma once

#ifdef TOKENPRUNE_SIMT
#include "../../simt/device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "clusters.h"
#include "record_launch.h"

// An array of the block: TOKENPRUNE_SHARED(float, sums, 32);
#define TOKENPRUNE_SHARED(type, name, count) __shared__ type name[count]

namespace tokenprune {

// The bytes of shared memory that the launch asked for.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

// ---- Asynchronous copies: device memory to shared memory, not through registers ----
// 16 bytes, both addresses aligned to 16; zeros when not `valid` (then `from` is not read).
__device__ inline void cp_async_16(void* to, const void* from, bool valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
// The copies since the last commit become a group of this thread.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Until at most kLeft of this thread's groups are on their way. The copies of other threads need a barrier on top.
template <int kLeft>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
}

// ---- Tensor cores: a warp together (PTX ISA, "Matrix fragments for mma") ----
// With g = lane / 4 and t = lane % 4, pairs of 16-bit numbers in a register, lower column or row in the lower half:
//   A [16, 16]  a[0] (g, 2t..)  a[1] (g + 8, 2t..)  a[2] (g, 2t + 8..)  a[3] (g + 8, 2t + 8..)
//   B [16, 8]   b[0] (2t.., g)  b[1] (2t + 8.., g)
//   D [16, 8]   d[0], d[1] (g, 2t..)  d[2], d[3] (g + 8, 2t..)
template <typename value_t>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for tf32, a number a register: A [16, 8] a[0] (g, t) a[1] (g + 8, t) a[2] (g, t + 4) a[3] (g + 8, t + 4);
// B [8, 8] b[0] (t, g) b[1] (t + 4, g); D as above.
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane l brings the address of row l % 8 of matrix l / 8,
// aligned to 16 bytes, and gets columns 2t, 2t + 1 of row g of each.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// 2^x, about two units in the last place; results below 2^-126 become 0.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// ---- Clusters: blocks that run at the same time and read each other's shared memory; sm_90 and later ----
// The block's place in its cluster.
__device__ inline int cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}
// All threads of all its blocks wait for each other, and see what the others wrote before.
__device__ inline void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
#else
  __trap();
#endif
}
// What the block of this rank has at the same place of its dynamic shared memory. It must not have returned.
template <typename T>
__device__ inline T cluster_read(const T* shared, int rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  T value{};
#if __CUDA_ARCH__ >= 900
  const auto own = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint32_t other;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(other) : "r"(own), "r"(rank));
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared::cluster.f32 %0, [%1];\n" : "=f"(value) : "r"(other) : "memory");
  } else {
    asm volatile("ld.shared::cluster.f64 %0, [%1];\n" : "=d"(value) : "r"(other) : "memory");
  }
#else
  __trap();
#endif
  return value;
}

// ---- Launches ----
// In clusters of so many blocks along x.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(int blocks, void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes,
                            cudaStream_t stream, Arguments... arguments) {
  const void* const address = reinterpret_cast<const void*>(kernel);
  cudaError_t error = ask_for_shared(address, shared_bytes);
  if (error != cudaSuccess) return error;
  bool execute = true;
  error = record_launch(address, grid, threads, shared_bytes, &execute);
  if (error != cudaSuccess || !execute) return error;
  const ClusterLaunch launch(blocks, grid, threads, shared_bytes, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, static_cast<Parameters>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  return launch_clusters(1, kernel, grid, threads, shared_bytes, stream, arguments...);
}

}  // namespace tokenprune

#endif
