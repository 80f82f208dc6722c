#include <optional>
#include <tuple>

#include "../ops/merge_tokens.h"
#include "adapter.h"
#include "kernels/merge.cuh"

namespace tokenprune {
namespace {

std::tuple<Tensor, Tensor, Tensor> merge_tokens_cuda(Tensor x, std::optional<Tensor> size, Tensor kept, Tensor dropped,
                                                     Tensor match, int64_t num_prefix) {
  const MergeTokensParams params = check_merge_tokens(x, size, kept, dropped, match, num_prefix);
  const CudaScope scope(x);
  x = torch::stable::contiguous(x);
  if (size.has_value()) size = torch::stable::contiguous(*size);
  kept = torch::stable::contiguous(kept);
  dropped = torch::stable::contiguous(dropped);
  match = torch::stable::contiguous(match);
  Tensor tokens = torch::stable::new_empty(x, {params.batch, params.tokens_out(), params.channels});
  Tensor sizes = torch::stable::new_empty(x, {params.batch, params.tokens_out()}, accumulate_dtype(x));
  Tensor log_sizes = torch::stable::new_empty(x, {params.batch, 1, 1, params.tokens_out()});
  TOKENPRUNE_DISPATCH(x.scalar_type(), "merge_tokens", [&] {
    using acc_t = accumulate_t<scalar_t>;
    const acc_t* s = size.has_value() ? data_ptr<acc_t>(*size) : nullptr;
    check_cuda(launch_merge_tokens(params, cuda_ptr<scalar_t>(x), s, data_ptr<int64_t>(kept),
                                   data_ptr<int64_t>(dropped), data_ptr<int64_t>(match), cuda_ptr<scalar_t>(tokens),
                                   data_ptr<acc_t>(sizes), cuda_ptr<scalar_t>(log_sizes), scope.stream),
               "merge_tokens");
  });
  return {tokens, sizes, log_sizes};
}

}  // namespace
}  // namespace tokenprune

TOKENPRUNE_CUDA_IMPL(m) { m.impl("merge_tokens", TORCH_BOX(&tokenprune::merge_tokens_cuda)); }
