// Selection: which patch tokens are among the `keep` best, in two lists of ascending positions. One block an image.
// A radix search finds the key of the last token that is kept, eight bits at a time; then one ordered sweep writes both
// lists. Ties keep the lower position, NaN comes last, and any number of tokens will do.
#pragma once

#include "../../ops/topk_gather_params.h"
#include "common.cuh"

namespace tokenprune {
namespace select {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRadixBits = 8;
constexpr int kBuckets = 1 << kRadixBits;
static_assert(kBuckets == kThreads, "one thread a bucket");

// Unsigned keys in the order of the scores; NaN gets 0, below minus infinity. Adding 0 turns -0 into 0.
__device__ inline uint32_t order_key(float score) {
  if (score != score) return 0;
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline uint64_t order_key(double score) {
  if (score != score) return 0;
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(score + 0.0));
  return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}

// How many threads before this one in the block raise `flag`; `total` becomes the count of the whole block.
__device__ inline int count_before(bool flag, int* warp_counts, int* total) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const unsigned votes = __ballot_sync(0xffffffffu, flag);
  if (lane == 0) warp_counts[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1));
  *total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warp_counts[w];
    *total += warp_counts[w];
  }
  __syncthreads();  // warp_counts may be written again
  return before;
}

// The key of the last kept token, and how many of the tokens with that key are kept.
template <typename key_t>
struct Threshold {
  key_t key;
  int64_t ties;
};

template <typename score_t>
__device__ auto find_threshold(const score_t* scores, int64_t n, int64_t keep, int* buckets) {
  using key_t = decltype(order_key(score_t{}));
  TOKENPRUNE_SHARED(int, chosen, 1);
  TOKENPRUNE_SHARED(int64_t, above, 1);
  key_t prefix = 0;
  key_t mask = 0;
  int64_t wanted = keep;
  for (int shift = 8 * static_cast<int>(sizeof(key_t)) - kRadixBits; shift >= 0; shift -= kRadixBits) {
    buckets[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const key_t key = order_key(scores[i]);
      if ((key & mask) == prefix) atomicAdd(&buckets[(key >> shift) & (kBuckets - 1)], 1);  // integers: any order
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int64_t count = 0;
      int bucket = kBuckets - 1;
      while (count + buckets[bucket] < wanted) count += buckets[bucket--];
      *chosen = bucket;
      *above = count;
    }
    __syncthreads();
    prefix |= static_cast<key_t>(*chosen) << shift;
    mask |= static_cast<key_t>(kBuckets - 1) << shift;
    wanted -= *above;
    __syncthreads();  // chosen and above may be written again
  }
  return Threshold<key_t>{prefix, wanted};
}

// One ordered sweep over n tokens: visit(i, place, stays) for each, where `place` counts the kept or the dropped ones
// before it. Tokens whose key_of(i) is above that of the threshold stay, and the first of equal ones. All threads of
// the block take part; barriers inside.
template <typename key_t, typename Key, typename Visit>
__device__ void sweep(int64_t n, const Threshold<key_t>& threshold, const Key& key_of, const Visit& visit) {
  TOKENPRUNE_SHARED(int, warp_counts, kWarps);
  int64_t kept_so_far = 0;
  int64_t ties_so_far = 0;
  for (int64_t base = 0; base < n; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    const bool valid = i < n;
    const key_t key = valid ? key_of(i) : 0;
    const bool tie = valid && key == threshold.key;
    int ties = 0;
    const int ties_before = count_before(tie, warp_counts, &ties);
    const bool stays = valid && (key > threshold.key || (tie && ties_so_far + ties_before < threshold.ties));
    int stay = 0;
    const int64_t before = kept_so_far + count_before(stays, warp_counts, &stay);
    if (valid) visit(i, stays ? before : i - before, stays);
    kept_so_far += stay;
    ties_so_far += ties;
  }
}

// The same for the block's n scores, of which the `keep` best stay.
template <typename score_t, typename Visit>
__device__ void split(const score_t* scores, int64_t n, int64_t keep, const Visit& visit) {
  TOKENPRUNE_SHARED(int, buckets, kBuckets);
  const auto threshold = find_threshold(scores, n, keep, buckets);
  sweep(n, threshold, [&](int64_t i) { return order_key(scores[i]); }, visit);
}

template <typename score_t>
__global__ void __launch_bounds__(kThreads) kernel(TopkGatherParams params,
                                                   const score_t* scores,  // [batch, tokens]
                                                   int64_t* kept,          // [batch, keep]
                                                   int32_t* dropped) {     // [batch, dropped]
  scores += blockIdx.x * params.tokens + params.num_prefix;
  kept += blockIdx.x * params.keep;
  dropped += blockIdx.x * params.dropped();
  split(scores, params.tokens - params.num_prefix, params.keep, [&](int64_t i, int64_t place, bool stays) {
    if (stays) {
      kept[place] = i + params.num_prefix;
    } else {
      dropped[place] = static_cast<int32_t>(i + params.num_prefix);
    }
  });
}

}  // namespace select

template <typename score_t>
cudaError_t launch_select(const TopkGatherParams& params, const score_t* scores, int64_t* kept, int32_t* dropped,
                          cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  return launch(select::kernel<score_t>, static_cast<unsigned>(params.batch), select::kThreads, 0, stream, params,
                scores, kept, dropped);
}

}  // namespace tokenprune
