#include <string>
#include <tuple>

#include "../ops/topk_gather.h"
#include "adapter.h"
#include "kernels/gather.cuh"
#include "kernels/select.cuh"

namespace tokenprune {
namespace {

void run_select(const TopkGatherParams& params, const Tensor& scores, const Tensor& kept, const Tensor& dropped,
                cudaStream_t stream) {
  int64_t* k = data_ptr<int64_t>(kept);
  int32_t* d = data_ptr<int32_t>(dropped);
  check_cuda(scores.scalar_type() == ScalarType::Double ? launch_select(params, data_ptr<double>(scores), k, d, stream)
                                                        : launch_select(params, data_ptr<float>(scores), k, d, stream),
             "topk_gather");
}

std::tuple<Tensor, Tensor> topk_gather_cuda(Tensor x, Tensor scores, int64_t keep, int64_t num_prefix,
                                            std::string fuse) {
  const TopkGatherParams params = check_topk_gather(x, scores, keep, num_prefix, fuse);
  const CudaScope scope(x);
  x = torch::stable::contiguous(x);
  // 16-bit scores widen to float exactly, so their order is kept.
  scores = torch::stable::contiguous(torch::stable::to(scores, accumulate_dtype(scores)));
  const Tensor weights = torch::stable::to(scores, accumulate_dtype(x));
  Tensor tokens = torch::stable::new_empty(x, {params.batch, params.tokens_out(), params.channels});
  Tensor index = torch::stable::new_empty(x, {params.batch, params.keep}, ScalarType::Long);
  Tensor dropped = torch::stable::new_empty(x, {params.batch, params.dropped()}, ScalarType::Int);
  run_select(params, scores, index, dropped, scope.stream);
  TOKENPRUNE_DISPATCH(x.scalar_type(), "topk_gather", [&] {
    using acc_t = accumulate_t<scalar_t>;
    auto* out = cuda_ptr<scalar_t>(tokens);
    check_cuda(launch_gather(params, cuda_ptr<scalar_t>(x), data_ptr<int64_t>(index), out, scope.stream),
               "topk_gather");
    const acc_t* w = params.fuse == Fuse::kWeighted ? data_ptr<acc_t>(weights) : nullptr;
    check_cuda(launch_fuse(params, cuda_ptr<scalar_t>(x), w, data_ptr<int32_t>(dropped), out, scope.stream),
               "topk_gather");
  });
  return {tokens, index};
}

}  // namespace
}  // namespace tokenprune

TOKENPRUNE_CUDA_IMPL(m) { m.impl("topk_gather", TORCH_BOX(&tokenprune::topk_gather_cuda)); }
