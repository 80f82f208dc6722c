// Kernels that use the machine rightly, and kernels that make one mistake each.
#include <numeric>

#include "case.h"

using namespace tokenprune;

extern "C" int tokenprune_simt_configure(const char* device, const char* order, unsigned seed);

namespace {

// ---- Right ----
__global__ void warp_kernel(int* out) {  // [6, 32]
  const int lane = threadIdx.x;
  out[lane] = __shfl_xor_sync(~0u, lane, 5);
  out[32 + lane] = __shfl_up_sync(~0u, lane, 3, 8);
  out[64 + lane] = __shfl_down_sync(~0u, lane, 3, 8);
  out[96 + lane] = __shfl_sync(~0u, lane, 9, 8);
  out[128 + lane] = __popc(__ballot_sync(~0u, lane % 3 == 0));
  out[160 + lane] = 0;
  if (lane < 20) out[160 + lane] = __any_sync(0xfffff, lane == 4) + 2 * __all_sync(0xfffff, lane < 19);
}

void warp_calls() {
  std::vector<int> out(192);
  check(launch(warp_kernel, 1, 32, 0, nullptr, out.data()));
  for (int lane = 0; lane < 32; ++lane) {
    expect(out[lane] == (lane ^ 5), "__shfl_xor_sync");
    expect(out[32 + lane] == (lane % 8 < 3 ? lane : lane - 3), "__shfl_up_sync");
    expect(out[64 + lane] == (lane % 8 > 4 ? lane : lane + 3), "__shfl_down_sync");
    expect(out[96 + lane] == lane / 8 * 8 + 1, "__shfl_sync");
    expect(out[128 + lane] == 11, "__ballot_sync");
    expect(out[160 + lane] == (lane < 20 ? 1 : 0), "__any_sync, __all_sync");
  }
}

constexpr int kThreads = 96;

__global__ void block_kernel(const int* in, int* out) {
  TOKENPRUNE_SHARED(int, sums, kThreads / kWarpSize);
  const int value = in[blockIdx.x * kThreads + threadIdx.x];
  const int total = block_sum<kThreads>(value, sums);
  const int odd = __syncthreads_count(value % 2);
  const int large = __syncthreads_or(value > 1000);
  const int small = __syncthreads_and(value < 1000);
  if (threadIdx.x == 0) out[blockIdx.x] = total + odd + large + small;
  atomicAdd(&out[gridDim.x], 1);
}

void block_calls() {
  std::vector<int> in(2 * kThreads), out(3);
  std::iota(in.begin(), in.end(), 0);
  check(launch(block_kernel, 2, kThreads, 0, nullptr, in.data(), out.data()));
  const int first = kThreads * (kThreads - 1) / 2;
  expect(out[0] == first + kThreads / 2 + 1, "barriers of block 0");
  expect(out[1] == first + kThreads * kThreads + kThreads / 2 + 1, "barriers of block 1");
  expect(out[2] == 2 * kThreads, "atomicAdd");
}

// Two numbers a thread, in clusters of four blocks; each block passes its rank around.
enum class Mistake { kNone, kNoBarrier, kReturnsEarly, kMissesBarrier, kForeignRank, kStaticShared };
constexpr int kCluster = 4;

template <Mistake kMistake>
__global__ void cluster_kernel(int* out) {
  int* const shared = reinterpret_cast<int*>(dynamic_shared());
  TOKENPRUNE_SHARED(int, fixed, 64);
  int* const own = kMistake == Mistake::kStaticShared ? fixed : shared + 64;
  const int rank = cluster_rank();
  own[threadIdx.x] = 1000 * blockIdx.x + threadIdx.x;
  if (kMistake == Mistake::kMissesBarrier && rank == 1) return;
  if (kMistake != Mistake::kNoBarrier) cluster_barrier();
  if (kMistake == Mistake::kReturnsEarly && rank == 2) return;
  const int next = (rank + 1) % (kMistake == Mistake::kForeignRank ? kCluster + 1 : kCluster);
  out[blockIdx.x * 64 + threadIdx.x] = cluster_read(own + 63 - threadIdx.x, next);
  cluster_barrier();
}

template <Mistake kMistake>
void clusters() {
  std::vector<int> out(8 * 64);
  check(tokenprune_simt_configure("sm_90", nullptr, 0) == 0 ? cudaSuccess : cudaErrorInvalidConfiguration);
  check(launch_clusters(kCluster, cluster_kernel<kMistake>, 8, 64, 128 * sizeof(int), nullptr, out.data()));
  for (int i = 0; i < 8 * 64; ++i) {
    const int block = i / 64, next = block / kCluster * kCluster + (block + 1) % kCluster;
    expect(out[i] == 1000 * next + 63 - i % 64, "cluster_read");
  }
}

// ---- Wrong ----
__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void early_return_kernel() {
  if (threadIdx.x == 40) return;
  __syncthreads();
}

__global__ void absent_lane_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(~0u, threadIdx.x, 1);
  __syncthreads();
}

__global__ void foreign_lane_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffff, threadIdx.x, 16);
}

template <bool kBarrier>
__global__ void exchange_kernel(int* out) {
  TOKENPRUNE_SHARED(int, values, 64);
  values[threadIdx.x] = threadIdx.x;
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

template <bool kBarrier>
__global__ void exchange_in_warp_kernel(int* out) {
  TOKENPRUNE_SHARED(int, values, 32);
  values[threadIdx.x] = threadIdx.x;
  if (kBarrier) __syncwarp();
  out[threadIdx.x] = values[31 - threadIdx.x];
}

template <void (*kKernel)(int*)>
void exchange(int threads) {
  std::vector<int> out(threads);
  check(launch(kKernel, 1, threads, 0, nullptr, out.data()));
  for (int t = 0; t < threads; ++t) expect(out[t] == threads - 1 - t, "exchange");
}

__global__ void blocks_write_one_place_kernel(int* out) { out[0] = blockIdx.x; }

__global__ void unwritten_shared_kernel(float* out) { *out = reinterpret_cast<float*>(dynamic_shared())[1]; }

template <bool kWait, bool kBarrier>
__global__ void copy_kernel(const float* in, float* out) {
  auto* staged = reinterpret_cast<float*>(dynamic_shared());
  cp_async_16(staged + 4 * threadIdx.x, in + 4 * threadIdx.x, threadIdx.x < 20);
  cp_async_commit();
  if (kWait) cp_async_wait<0>();
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = staged[127 - threadIdx.x] + staged[threadIdx.x];
  if (!kWait) cp_async_wait<0>();
}

template <bool kWait, bool kBarrier>
void copies() {
  std::vector<float> in(80), out(32);
  std::iota(in.begin(), in.end(), 1.0f);
  check(launch(copy_kernel<kWait, kBarrier>, 1, 32, 512, nullptr, in.data(), out.data()));
  for (int t = 0; t < 32; ++t) expect(out[t] == t + 1, "cp.async");
}

__global__ void copy_forgotten_kernel(const float* in) {
  cp_async_16(dynamic_shared(), in, true);
  cp_async_commit();
}

__global__ void past_the_end_kernel(float* out, int n) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  if (i <= n) out[i] = 1;
}

__global__ void past_the_end_of_shared_kernel(float* out) {
  TOKENPRUNE_SHARED(float, values, 32);
  values[threadIdx.x + 1] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void past_the_end_of_dynamic_shared_kernel() {
  reinterpret_cast<float*>(dynamic_shared())[threadIdx.x + 1] = 0;
}

}  // namespace

std::vector<Case> executor_cases() {
  return {
      {"warp_calls", warp_calls},
      {"block_calls", block_calls},
      {"exchange", [] { exchange<exchange_kernel<true>>(64); }},
      {"exchange_in_warp", [] { exchange<exchange_in_warp_kernel<true>>(32); }},
      {"copies", copies<true, true>},
      {"clusters", clusters<Mistake::kNone>},
      {"cluster_without_barrier", clusters<Mistake::kNoBarrier>},
      {"cluster_returns_early", clusters<Mistake::kReturnsEarly>},
      {"cluster_misses_barrier", clusters<Mistake::kMissesBarrier>},
      {"cluster_foreign_rank", clusters<Mistake::kForeignRank>},
      {"cluster_static_shared", clusters<Mistake::kStaticShared>},
      {"clusters_before_hopper",
       [] { check(launch_clusters(2, cluster_kernel<Mistake::kNone>, 2, 64, 512, nullptr, nullptr)); }},
      {"divergent_barrier", [] { check(launch(divergent_barrier_kernel, 1, 64, 0, nullptr)); }},
      {"early_return", [] { check(launch(early_return_kernel, 1, 64, 0, nullptr)); }},
      {"absent_lane",
       [] {
         std::vector<int> out(32);
         check(launch(absent_lane_kernel, 1, 32, 0, nullptr, out.data()));
       }},
      {"foreign_lane",
       [] {
         std::vector<int> out(32);
         check(launch(foreign_lane_kernel, 1, 32, 0, nullptr, out.data()));
       }},
      {"exchange_without_barrier", [] { exchange<exchange_kernel<false>>(64); }},
      {"exchange_in_warp_without_barrier", [] { exchange<exchange_in_warp_kernel<false>>(32); }},
      {"blocks_write_one_place",
       [] {
         int out = 0;
         check(launch(blocks_write_one_place_kernel, 3, 1, 0, nullptr, &out));
       }},
      {"unwritten_shared",
       [] {
         float out = 0;
         check(launch(unwritten_shared_kernel, 1, 1, 8, nullptr, &out));
         expect(out == out, "NaN from shared memory that nobody wrote");
       }},
      {"copy_without_wait", copies<false, true>},
      {"copy_without_barrier", copies<true, false>},
      {"copy_forgotten",
       [] {
         alignas(16) float in[4] = {};
         check(launch(copy_forgotten_kernel, 1, 1, 16, nullptr, in));
       }},
      {"past_the_end",
       [] {
         std::vector<float> out(70);
         check(launch(past_the_end_kernel, 3, 32, 0, nullptr, out.data(), 70));
       }},
      {"past_the_end_of_shared",
       [] {
         std::vector<float> out(32);
         check(launch(past_the_end_of_shared_kernel, 1, 32, 0, nullptr, out.data()));
       }},
      {"past_the_end_of_dynamic_shared",
       [] { check(launch(past_the_end_of_dynamic_shared_kernel, 1, 32, 128, nullptr)); }},
      {"too_much_shared", [] { check(launch(past_the_end_of_dynamic_shared_kernel, 1, 32, 1 << 20, nullptr)); }},
  };
}
