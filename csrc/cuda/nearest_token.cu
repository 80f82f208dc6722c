#include <string>
#include <tuple>

#include "../ops/nearest_token.h"
#include "kernels/nearest.cuh"
#include "nearest_token.h"

namespace tokenprune {
namespace {

std::tuple<Tensor, Tensor> nearest_token_cuda(Tensor metric, Tensor rank, int64_t num_prefix, std::string similarity,
                                              bool allow_tf32) {
  const NearestTokenParams params = check_nearest_token(metric, rank, num_prefix, similarity);
  const CudaScope scope(metric);
  return nearest_cuda(params, allow_tf32, torch::stable::contiguous(metric), torch::stable::contiguous(rank),
                      scope.stream);
}

}  // namespace

std::tuple<Tensor, Tensor> nearest_cuda(const NearestTokenParams& params, bool allow_tf32, const Tensor& metric,
                                        const Tensor& rank, cudaStream_t stream) {
  const int64_t n = params.patches();
  const ScalarType acc_dtype = accumulate_dtype(metric);
  Tensor similarity = torch::stable::new_empty(metric, {params.batch, params.tokens}, acc_dtype);
  Tensor index = torch::stable::new_empty(metric, {params.batch, params.tokens}, ScalarType::Long);
  const Tensor rows = torch::stable::new_empty(metric, {params.batch, n, params.channels});
  const Tensor terms = torch::stable::new_empty(metric, {params.batch, n, 2}, acc_dtype);
  const Tensor tokens = torch::stable::new_empty(metric, {params.batch, n}, ScalarType::Int);
  const Tensor columns = torch::stable::new_empty(metric, {params.batch, n}, ScalarType::Int);
  TOKENPRUNE_DISPATCH(metric.scalar_type(), "nearest_token", [&] {
    using value_t = typename CudaType<scalar_t>::type;
    using acc_t = accumulate_t<scalar_t>;
    const NearestWorkspace<value_t, acc_t> sorted{cuda_ptr<scalar_t>(rows), data_ptr<NearestTerms<acc_t>>(terms),
                                                  data_ptr<int32_t>(tokens), data_ptr<int32_t>(columns)};
    with_tf32<scalar_t>(allow_tf32, [&](auto tf32) {
      check_cuda(launch_nearest<tf32()>(params, static_cast<const value_t*>(cuda_ptr<scalar_t>(metric)),
                                        data_ptr<int64_t>(rank), sorted, data_ptr<acc_t>(similarity),
                                        data_ptr<int64_t>(index), stream),
                 "nearest_token");
    });
  });
  return {similarity, index};
}

}  // namespace tokenprune

TOKENPRUNE_CUDA_IMPL(m) { m.impl("nearest_token", TORCH_BOX(&tokenprune::nearest_token_cuda)); }
