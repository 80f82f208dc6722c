#include <optional>
#include <string>

#include "../ops/class_attention.h"
#include "adapter.h"
#include "kernels/class_attention.cuh"

namespace tokenprune {
namespace {

Tensor class_attention_cuda(Tensor q, Tensor k, std::optional<Tensor> v, std::optional<Tensor> bias, double scale,
                            std::string head_reduce) {
  const ClassAttentionParams params = check_class_attention(q, k, v, bias, scale, head_reduce);
  const CudaScope scope(q);
  const auto dtype = accumulate_dtype(q);
  Tensor out = torch::stable::new_empty(q, {params.qk.batch, params.qk.tokens}, dtype);
  const Tensor weights = torch::stable::new_empty(q, {params.qk.batch, params.qk.heads, params.qk.tokens}, dtype);
  TOKENPRUNE_DISPATCH(q.scalar_type(), "class_attention", [&] {
    using value_t = typename CudaType<scalar_t>::type;
    using acc_t = accumulate_t<scalar_t>;
    const ClassAttentionInputs<value_t> in{cuda_ptr<scalar_t>(q), cuda_ptr<scalar_t>(k),
                                           v.has_value() ? cuda_ptr<scalar_t>(*v) : nullptr,
                                           bias.has_value() ? cuda_ptr<scalar_t>(*bias) : nullptr, false};
    check_cuda(launch_class_attention(params, in, data_ptr<acc_t>(weights), data_ptr<acc_t>(out), scope.stream),
               "class_attention");
  });
  return out;
}

}  // namespace
}  // namespace tokenprune

TOKENPRUNE_CUDA_IMPL(m) { m.impl("class_attention", TORCH_BOX(&tokenprune::class_attention_cuda)); }
