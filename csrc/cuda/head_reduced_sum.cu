#include <string>

#include "../ops/head_reduced_sum.h"
#include "adapter.h"
#include "kernels/head_reduced_sum.cuh"

namespace tokenprune {
namespace {

Tensor head_reduced_sum_cuda(Tensor features, std::string head_reduce) {
  const HeadReducedSumParams params = check_head_reduced_sum(features, head_reduce);
  const CudaScope scope(features);
  Tensor out = torch::stable::new_empty(features, {params.batch, params.tokens}, accumulate_dtype(features));
  TOKENPRUNE_DISPATCH(features.scalar_type(), "head_reduced_sum", [&] {
    using acc_t = accumulate_t<scalar_t>;
    check_cuda(launch_head_reduced_sum(params, cuda_ptr<scalar_t>(features), data_ptr<acc_t>(out), scope.stream),
               "head_reduced_sum");
  });
  return out;
}

}  // namespace
}  // namespace tokenprune

TOKENPRUNE_CUDA_IMPL(m) { m.impl("head_reduced_sum", TORCH_BOX(&tokenprune::head_reduced_sum_cuda)); }
