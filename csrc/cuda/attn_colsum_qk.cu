#include <optional>
#include <string>

#include "../ops/attn_colsum_qk.h"
#include "adapter.h"
#include "kernels/attn_colsum_qk.cuh"

namespace tokenprune {
namespace {

Tensor attn_colsum_qk_cuda(Tensor q, Tensor k, double scale, std::string head_reduce, std::string query_rows,
                           int64_t num_prefix, std::optional<Tensor> lse, bool allow_tf32) {
  const AttnColsumQkParams params = check_attn_colsum_qk(q, k, scale, head_reduce, query_rows, num_prefix, lse);
  const CudaScope scope(q);
  const auto dtype = accumulate_dtype(q);
  Tensor out = torch::stable::new_empty(q, {params.qk.batch, params.qk.tokens}, dtype);
  Tensor workspace = torch::stable::new_empty(q, {attn_colsum_qk_workspace(params, lse.has_value())}, dtype);
  TOKENPRUNE_DISPATCH(q.scalar_type(), "attn_colsum_qk", [&] {
    using acc_t = accumulate_t<scalar_t>;
    const acc_t* sums = lse.has_value() ? data_ptr<acc_t>(*lse) : nullptr;
    with_tf32<scalar_t>(allow_tf32, [&](auto tf32) {
      check_cuda(launch_attn_colsum_qk<tf32()>(params, cuda_ptr<scalar_t>(q), cuda_ptr<scalar_t>(k), sums,
                                               data_ptr<acc_t>(workspace), data_ptr<acc_t>(out), scope.stream),
                 "attn_colsum_qk");
    });
  });
  return out;
}

}  // namespace
}  // namespace tokenprune

TOKENPRUNE_CUDA_IMPL(m) { m.impl("attn_colsum_qk", TORCH_BOX(&tokenprune::attn_colsum_qk_cuda)); }
