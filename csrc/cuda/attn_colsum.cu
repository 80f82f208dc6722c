#include <string>

#include "../ops/attn_colsum.h"
#include "adapter.h"
#include "kernels/attn_colsum.cuh"

namespace tokenprune {
namespace {

Tensor attn_colsum_cuda(Tensor attn, std::string head_reduce, std::string query_rows, int64_t num_prefix) {
  const AttnColsumParams params = check_attn_colsum(attn, head_reduce, query_rows, num_prefix);
  const CudaScope scope(attn);
  attn = torch::stable::contiguous(attn);
  Tensor out = torch::stable::new_empty(attn, {params.batch, params.tokens}, accumulate_dtype(attn));
  TOKENPRUNE_DISPATCH(attn.scalar_type(), "attn_colsum", [&] {
    using acc_t = accumulate_t<scalar_t>;
    check_cuda(launch_attn_colsum(params, cuda_ptr<scalar_t>(attn), data_ptr<acc_t>(out), scope.stream), "attn_colsum");
  });
  return out;
}

}  // namespace
}  // namespace tokenprune

TOKENPRUNE_CUDA_IMPL(m) { m.impl("attn_colsum", TORCH_BOX(&tokenprune::attn_colsum_cuda)); }
