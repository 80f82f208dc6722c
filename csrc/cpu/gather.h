// Copies of the tokens that stay.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../ops/topk_gather_params.h"
#include "../stable.h"

namespace tokenprune {

// Copies the prefix tokens and the kept ones of all images, rows of `row_bytes`; a large image is shared by several
// threads. The kept positions of an image are `stride` behind those of the image before.
template <typename position_t>
void gather_all(const TopkGatherParams& params, const void* x, const position_t* kept, int64_t stride,
                int64_t row_bytes, void* out) {
  constexpr int64_t kGrain = 128 * 1024;  // bytes a thread should have to copy before another one is worth waking
  const char* from = static_cast<const char*>(x);
  char* to = static_cast<char*>(out);
  const int64_t rows = params.num_prefix + params.keep;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row_bytes));
  torch::stable::parallel_for(0, params.batch * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / rows, place = row % rows;
      const int64_t token =
          place < params.num_prefix ? place : static_cast<int64_t>(kept[b * stride + place - params.num_prefix]);
      std::memcpy(to + (b * params.tokens_out() + place) * row_bytes, from + (b * params.tokens + token) * row_bytes,
                  row_bytes);
    }
  });
}

}  // namespace tokenprune
