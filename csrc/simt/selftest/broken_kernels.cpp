// Two of our kernels with one mistake each: the build copies their sources and changes a line (see CMakeLists.txt).
#include "case.h"
// Copies:
#include "broken/attn_colsum.cuh"
#include "broken/gather.cuh"

using namespace tokenprune;

namespace {

// Without the barrier between the warps' sums and their total.
void broken_attn_colsum() {
  const int64_t n = 70, heads = 2;
  const std::vector<float> attn(heads * n * n, 1.0f);
  std::vector<float> out(n);
  const AttnColsumParams params{1, heads, n, 0, n, 0, HeadReduce::kSum};
  check(launch_attn_colsum(params, attn.data(), out.data(), nullptr));
  for (const float value : out) expect(value == n * heads, "a column sum is " + std::to_string(value));
}

// One row too many is copied.
void broken_gather() {
  const int64_t n = 5, channels = 4;
  const std::vector<float> x(n * channels, 1.0f);
  const std::vector<float> scores = {0, 3, 1, 2, 4};
  const TopkGatherParams params{1, n, channels, 1, 3, Fuse::kNone};
  std::vector<float> out(params.tokens_out() * channels);
  std::vector<int64_t> index(params.keep);
  check(launch_topk_gather<float>(params, x.data(), scores.data(), out.data(), index.data(), nullptr));
}

}  // namespace

std::vector<Case> broken_kernel_cases() {
  return {{"broken_attn_colsum", broken_attn_colsum}, {"broken_gather", broken_gather}};
}
