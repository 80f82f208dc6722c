#include <string>
#include <tuple>

#include "../ops/topk_gather.h"
#include "adapter.h"
#include "kernels/gather.cuh"

namespace tokenprune {
namespace {

std::tuple<Tensor, Tensor> topk_gather_cuda(Tensor x, Tensor scores, int64_t keep, int64_t num_prefix,
                                            std::string fuse) {
  const TopkGatherParams params = check_topk_gather(x, scores, keep, num_prefix, fuse);
  const CudaScope scope(x);
  x = torch::stable::contiguous(x);
  // 16-bit scores widen to float exactly, so their order is kept.
  scores = torch::stable::contiguous(torch::stable::to(scores, accumulate_dtype(scores)));
  Tensor tokens = torch::stable::new_empty(x, {params.batch, params.tokens_out(), params.channels});
  Tensor index = torch::stable::new_empty(x, {params.batch, params.keep}, ScalarType::Long);
  TOKENPRUNE_DISPATCH(x.scalar_type(), "topk_gather", [&] {
    const auto run = [&](const auto* ranked) {
      check_cuda(
          launch_topk_gather<accumulate_t<scalar_t>>(params, cuda_ptr<scalar_t>(x), ranked, cuda_ptr<scalar_t>(tokens),
                                                     data_ptr<int64_t>(index), scope.stream),
          "topk_gather");
    };
    if (scores.scalar_type() == ScalarType::Double) {
      run(data_ptr<double>(scores));
    } else {
      run(data_ptr<float>(scores));
    }
  });
  return {tokens, index};
}

}  // namespace
}  // namespace tokenprune

TOKENPRUNE_CUDA_IMPL(m) { m.impl("topk_gather", TORCH_BOX(&tokenprune::topk_gather_cuda)); }
