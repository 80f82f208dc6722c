#include <tuple>

#include "../ops/quantile_gather.h"
#include "adapter.h"
#include "kernels/quantile_gather.cuh"

namespace tokenprune {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> quantile_gather_cuda(Tensor x, Tensor scores, int64_t keep,
                                                                int64_t num_prefix) {
  const TopkGatherParams params = check_quantile_gather(x, scores, keep, num_prefix);
  const CudaScope scope(x);
  x = as_contiguous(x);
  // 16-bit scores widen to float exactly.
  const ScalarType wide = accumulate_dtype(scores);
  scores = as_contiguous(scores.scalar_type() == wide ? scores : torch::stable::to(scores, wide));
  Tensor tokens = allocate(x, {params.batch, params.tokens_out(), params.channels}, x.scalar_type());
  Tensor index = allocate(x, {params.batch, params.keep}, ScalarType::Long);
  Tensor sizes = allocate(x, {params.batch, params.tokens_out()}, accumulate_dtype(x));
  Tensor log_sizes = allocate(x, {params.batch, 1, 1, params.tokens_out()}, x.scalar_type());
  TOKENPRUNE_DISPATCH(x.scalar_type(), "quantile_gather", [&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto run = [&](const auto* shares) {
      check_cuda(launch_quantile_gather<acc_t>(params, cuda_ptr<scalar_t>(x), shares, cuda_ptr<scalar_t>(tokens),
                                               data_ptr<int64_t>(index), data_ptr<acc_t>(sizes),
                                               cuda_ptr<scalar_t>(log_sizes), scope.stream),
                 "quantile_gather");
    };
    if (wide == ScalarType::Double) {
      run(data_ptr<const double>(scores));
    } else {
      run(data_ptr<const float>(scores));
    }
  });
  return {tokens, index, sizes, log_sizes};
}

}  // namespace
}  // namespace tokenprune

TOKENPRUNE_CUDA_IMPL(m) { m.impl("quantile_gather", TORCH_BOX(&tokenprune::quantile_gather_cuda)); }
