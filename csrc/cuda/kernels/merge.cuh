// Size-weighted means: every token that stays takes in the dropped tokens that are matched with it. A warp forms one
// tile of channels of one token: it looks through the matches 32 at a time and adds the rows it finds in their order.
#pragma once

#include "../../ops/merge_tokens_params.h"
#include "common.cuh"

namespace tokenprune {
namespace merge {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// Positions are data, and the host does not wait to see them: one outside of the image is not followed.
__device__ inline bool inside(const MergeTokensParams& params, int64_t token) {
  return 0 <= token && token < params.tokens;
}

// A lane has kPacks packs, neighbouring lanes have neighbouring packs; a row is `packs` of them.
template <typename value_t, typename acc_t, int kCount, int kPacks>
__global__ void __launch_bounds__(kThreads) kernel(MergeTokensParams params, int64_t packs, int64_t tiles,
                                                   const Pack<value_t, kCount>* x,  // [batch, tokens, packs]
                                                   const acc_t* size,               // [batch, tokens], or null: ones
                                                   const int64_t* kept,             // [batch, keep]
                                                   const int64_t* dropped,          // [batch, dropped]
                                                   const int64_t* match,            // [batch, dropped]
                                                   Pack<value_t, kCount>* out,      // [batch, tokens_out, packs]
                                                   acc_t* sizes,                    // [batch, tokens_out]
                                                   value_t* logs) {                 // [batch, tokens_out]
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  const int64_t row = task / tiles;
  if (row >= params.batch * params.tokens_out()) return;  // the whole warp, and nothing waits for it
  const int lane = threadIdx.x % kWarpSize;
  const int64_t tile = task % tiles * (kPacks * kWarpSize);
  const int64_t image = row / params.tokens_out();
  const int64_t place = row % params.tokens_out();
  const bool prefix = place < params.num_prefix;
  const int64_t token = prefix ? place : kept[image * params.keep + place - params.num_prefix];
  const bool exists = inside(params, token);
  x += image * params.tokens * packs + tile;
  out += row * packs + tile;
  dropped += image * params.dropped;
  match += image * params.dropped;
  if (size) size += image * params.tokens;

  acc_t total = exists ? (size ? size[token] : acc_t(1)) : acc_t(0);
  Pack<value_t, kCount> own[kPacks] = {};
  acc_t sums[kPacks][kCount];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int i = p * kWarpSize + lane;
    if (exists && tile + i < packs) own[p] = x[token * packs + i];
#pragma unroll
    for (int c = 0; c < kCount; ++c) sums[p][c] = total * to_acc<acc_t>(own[p].values[c]);
  }

  bool merged = false;
  const int64_t count = prefix || !exists ? 0 : params.dropped;
  for (int64_t base = 0; base < count; base += kWarpSize) {
    const int64_t j = base + lane;
    unsigned found = __ballot_sync(0xffffffffu, j < count && match[j] == token && inside(params, dropped[j]));
    for (; found != 0; found &= found - 1) {
      const int64_t source = dropped[base + __ffs(static_cast<int>(found)) - 1];
      const acc_t weight = size ? size[source] : acc_t(1);
      total += weight;
      merged = true;
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int i = p * kWarpSize + lane;
        if (tile + i >= packs) continue;
        const Pack<value_t, kCount> more = x[source * packs + i];
#pragma unroll
        for (int c = 0; c < kCount; ++c) sums[p][c] += weight * to_acc<acc_t>(more.values[c]);
      }
    }
  }

#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int i = p * kWarpSize + lane;
    if (tile + i >= packs) continue;
    if (merged) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) own[p].values[c] = from_acc<value_t>(sums[p][c] / total);
    }
    out[i] = own[p];
  }
  if (tile == 0 && lane == 0) {
    sizes[row] = total;
    logs[row] = from_acc<value_t>(logarithm(total));
  }
}

template <int kCount, int kPacks, typename value_t, typename acc_t>
cudaError_t launch_packs(const MergeTokensParams& params, const value_t* x, const acc_t* size, const int64_t* kept,
                         const int64_t* dropped, const int64_t* match, value_t* out, acc_t* sizes, value_t* logs,
                         cudaStream_t stream) {
  using pack_t = Pack<value_t, kCount>;
  const int64_t packs = params.channels / kCount;
  // Without channels there are still sizes to write.
  const int64_t tiles = packs == 0 ? 1 : ceil_div<int64_t>(packs, kPacks * kWarpSize);
  const int64_t tasks = params.batch * params.tokens_out() * tiles;
  return launch(kernel<value_t, acc_t, kCount, kPacks>, static_cast<unsigned>(ceil_div<int64_t>(tasks, kWarps)),
                kThreads, 0, stream, params, packs, tiles, reinterpret_cast<const pack_t*>(x), size, kept, dropped,
                match, reinterpret_cast<pack_t*>(out), sizes, logs);
}

}  // namespace merge

// Moves 16 bytes a lane where rows and pointers are aligned to that, else single values. The sums are the same.
template <typename value_t, typename acc_t>
cudaError_t launch_merge_tokens(const MergeTokensParams& params, const value_t* x, const acc_t* size,
                                const int64_t* kept, const int64_t* dropped, const int64_t* match, value_t* out,
                                acc_t* sizes, value_t* logs, cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  constexpr int kWide = 16 / static_cast<int>(sizeof(value_t));
  const bool aligned = params.channels % kWide == 0 && reinterpret_cast<uint64_t>(x) % 16 == 0 &&
                       reinterpret_cast<uint64_t>(out) % 16 == 0;
  return aligned ? merge::launch_packs<kWide, 1>(params, x, size, kept, dropped, match, out, sizes, logs, stream)
                 : merge::launch_packs<1, 4>(params, x, size, kept, dropped, match, out, sizes, logs, stream);
}

}  // namespace tokenprune
