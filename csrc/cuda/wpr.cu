#include <optional>

#include "../ops/wpr.h"
#include "adapter.h"
#include "kernels/wpr.cuh"

namespace tokenprune {
namespace {

Tensor wpr_cuda(Tensor attn, std::optional<Tensor> start, int64_t max_iters, double tol) {
  const WprParams params = check_wpr(attn, start, max_iters, tol);
  const CudaScope scope(attn);
  attn = torch::stable::contiguous(attn);
  if (start.has_value()) start = torch::stable::contiguous(*start);
  const auto dtype = accumulate_dtype(attn);
  Tensor out = torch::stable::new_empty(attn, {attn.size(0), attn.size(1), attn.size(2)}, dtype);
  TOKENPRUNE_DISPATCH(attn.scalar_type(), "wpr", [&] {
    using acc_t = accumulate_t<scalar_t>;
    using value_t = typename CudaType<scalar_t>::type;
    int blocks = 0;
    check_cuda(wpr_blocks<value_t, acc_t>(params, &blocks), "wpr");
    Tensor workspace = torch::stable::new_empty(out, {blocks > 0 ? 0 : params.matrices * params.tokens});
    const acc_t* first = start.has_value() ? data_ptr<acc_t>(*start) : nullptr;
    check_cuda(launch_wpr(params, blocks, cuda_ptr<scalar_t>(attn), first, data_ptr<acc_t>(workspace),
                          data_ptr<acc_t>(out), scope.stream),
               "wpr");
  });
  return out;
}

}  // namespace
}  // namespace tokenprune

TOKENPRUNE_CUDA_IMPL(m) { m.impl("wpr", TORCH_BOX(&tokenprune::wpr_cuda)); }
