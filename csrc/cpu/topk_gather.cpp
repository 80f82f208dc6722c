#include "../ops/topk_gather.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "gather.h"
#include "select.h"
#include "simd.h"

namespace tokenprune {
namespace {

// The patch positions of all images: the kept ones first, then the dropped ones.
std::vector<int32_t> select_all(const TopkGatherParams& params, const Tensor& scores) {
  const int64_t patches = params.tokens - params.num_prefix;
  std::vector<int32_t> order(params.batch * patches);
  TOKENPRUNE_DISPATCH(scores.scalar_type(), "topk_gather", [&] {
    const auto* s = vector_ptr<scalar_t>(scores);
    torch::stable::parallel_for(0, params.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) select(params, s + b * params.tokens, order.data() + b * patches);
    });
  });
  return order;
}

// The fused token of one image, summed in ascending order of position.
template <typename scalar_t>
void fuse_dropped(const TopkGatherParams& params,
                  const scalar_t* x,                      // [tokens, channels]
                  const accumulate_t<scalar_t>* weights,  // [tokens], or null for the mean
                  const int32_t* dropped,
                  accumulate_t<scalar_t>* sum,  // [channels]
                  scalar_t* out) {              // [channels]
  using acc_t = accumulate_t<scalar_t>;
  const int64_t channels = params.channels;
  const auto* values = reinterpret_cast<const vectorizable_t<scalar_t>*>(x);
  std::fill_n(sum, channels, acc_t(0));
  for (int64_t i = 0; i < params.dropped(); ++i) {
    const acc_t weight = weights ? weights[dropped[i]] : acc_t(1);
    add_scaled(weight, values + dropped[i] * channels, channels, sum);
  }
  const acc_t divisor = weights ? acc_t(1) : static_cast<acc_t>(params.dropped());
  for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<scalar_t>(sum[c] / divisor);
}

std::tuple<Tensor, Tensor> topk_gather_cpu(Tensor x, Tensor scores, int64_t keep, int64_t num_prefix,
                                           std::string fuse) {
  const TopkGatherParams params = check_topk_gather(x, scores, keep, num_prefix, fuse);
  x = as_contiguous(x);
  scores = as_contiguous(scores);
  const std::vector<int32_t> order = select_all(params, scores);
  const bool weighted = params.fuse == Fuse::kWeighted;
  const Tensor weights = weighted ? torch::stable::to(scores, accumulate_dtype(x)) : scores;
  Tensor tokens = allocate(x, {params.batch, params.tokens_out(), params.channels}, x.scalar_type());
  Tensor index = allocate(x, {params.batch, params.keep}, ScalarType::Long);
  TOKENPRUNE_DISPATCH(x.scalar_type(), "topk_gather", [&] {
    using acc_t = accumulate_t<scalar_t>;
    gather_all(params, x.data_ptr(), order.data(), params.tokens - params.num_prefix,
               params.channels * static_cast<int64_t>(sizeof(scalar_t)), tokens.data_ptr());
    torch::stable::parallel_for(0, params.batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<acc_t> sum(params.has_fused() ? params.channels : 0);
      for (int64_t b = begin; b < end; ++b) {
        const int32_t* kept = order.data() + b * (params.tokens - params.num_prefix);
        const scalar_t* in = data_ptr<scalar_t>(x) + b * params.tokens * params.channels;
        scalar_t* out = data_ptr<scalar_t>(tokens) + b * params.tokens_out() * params.channels;
        std::copy_n(kept, params.keep, data_ptr<int64_t>(index) + b * params.keep);
        if (!params.has_fused()) continue;
        const acc_t* w = weighted ? data_ptr<acc_t>(weights) + b * params.tokens : nullptr;
        fuse_dropped(params, in, w, kept + params.keep, sum.data(), out + (params.tokens_out() - 1) * params.channels);
      }
    });
  });
  return {tokens, index};
}

}  // namespace
}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("topk_gather", TORCH_BOX(&tokenprune::topk_gather_cpu)); }
