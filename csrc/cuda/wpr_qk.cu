#include <optional>

#include "../ops/wpr_qk.h"
#include "adapter.h"
#include "kernels/wpr_qk.cuh"
#include "operators.h"

namespace tokenprune {

Tensor wpr_qk_cuda(Tensor q, Tensor k, double scale, std::optional<Tensor> start, int64_t max_iters, double tol,
                   std::optional<Tensor> among, int64_t num_prefix, bool allow_tf32) {
  const WprQkParams params = check_wpr_qk(q, k, scale, start, max_iters, tol, among, num_prefix);
  const CudaScope scope(q);
  const auto dtype = accumulate_dtype(q);
  Tensor out = torch::stable::new_empty(q, {params.qk.batch, params.qk.heads, params.qk.tokens}, dtype);
  TOKENPRUNE_DISPATCH(q.scalar_type(), "wpr_qk", [&] {
    using acc_t = accumulate_t<scalar_t>;
    using value_t = typename CudaType<scalar_t>::type;
    int blocks = 0;
    check_cuda(wpr_qk_blocks<value_t, acc_t>(params, &blocks), "wpr_qk");
    Tensor workspace = torch::stable::new_empty(q, {wpr_qk_workspace(params, blocks)}, dtype);
    Tensor active = torch::stable::new_empty(q, {blocks > 0 ? 0 : params.wpr.matrices}, ScalarType::Int);
    const acc_t* first = start.has_value() ? data_ptr<acc_t>(*start) : nullptr;
    Tensor rows = torch::stable::new_empty(q, {among.has_value() ? wpr_qk_rows(params) : 0});
    const int64_t* named = among.has_value() ? data_ptr<int64_t>(*among) : nullptr;
    with_tf32<scalar_t>(allow_tf32, [&](auto tf32) {
      check_cuda(launch_wpr_qk<tf32()>(params, blocks, cuda_ptr<scalar_t>(q), cuda_ptr<scalar_t>(k), first, named,
                                       cuda_ptr<scalar_t>(rows), data_ptr<acc_t>(workspace), data_ptr<int>(active),
                                       data_ptr<acc_t>(out), scope.stream),
                 "wpr_qk");
    });
  });
  return out;
}

}  // namespace tokenprune

TOKENPRUNE_CUDA_IMPL(m) { m.impl("wpr_qk", TORCH_BOX(&tokenprune::wpr_qk_cuda)); }
