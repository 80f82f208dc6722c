#include "../ops/head_aggregate.h"
#include "adapter.h"
#include "kernels/head_aggregate.cuh"
#include "operators.h"

namespace tokenprune {

Tensor head_aggregate_cuda(Tensor scores, double vmin, double vmax, int64_t num_prefix) {
  const HeadAggregateParams params = check_head_aggregate(scores, vmin, vmax, num_prefix);
  const CudaScope scope(scores);
  scores = torch::stable::contiguous(scores);
  Tensor out = torch::stable::new_empty(scores, {params.batch, params.tokens}, accumulate_dtype(scores));
  TOKENPRUNE_DISPATCH(scores.scalar_type(), "head_aggregate", [&] {
    using acc_t = accumulate_t<scalar_t>;
    check_cuda(launch_head_aggregate(params, cuda_ptr<scalar_t>(scores), data_ptr<acc_t>(out), scope.stream),
               "head_aggregate");
  });
  return out;
}

}  // namespace tokenprune

TOKENPRUNE_CUDA_IMPL(m) { m.impl("head_aggregate", TORCH_BOX(&tokenprune::head_aggregate_cuda)); }
