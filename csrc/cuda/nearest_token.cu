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
  return nearest_cuda(params, allow_tf32, metric, torch::stable::contiguous(rank), scope.stream);
}

// Tokens are compared as compared_t.
template <typename scalar_t, typename compared_t>
void launch_all(const NearestTokenParams& params, bool allow_tf32, const Tensor& metric, const Tensor& rank,
                const Tensor& similarity, const Tensor& index, cudaStream_t stream) {
  using value_t = typename CudaType<compared_t>::type;
  using acc_t = accumulate_t<scalar_t>;
  const int64_t n = params.patches();
  const ScalarType acc_dtype = accumulate_dtype(metric);
  const ScalarType compared = std::is_same_v<scalar_t, compared_t> ? metric.scalar_type() : acc_dtype;
  const Tensor rows = torch::stable::new_empty(metric, {params.batch, n, params.channels}, compared);
  const Tensor terms = torch::stable::new_empty(metric, {params.batch, n, 2}, acc_dtype);
  const Tensor tokens = torch::stable::new_empty(metric, {params.batch, n}, ScalarType::Int);
  const Tensor columns = torch::stable::new_empty(metric, {params.batch, n}, ScalarType::Int);
  const NearestWorkspace<value_t, acc_t> sorted{cuda_ptr<compared_t>(rows), data_ptr<NearestTerms<acc_t>>(terms),
                                                data_ptr<int32_t>(tokens), data_ptr<int32_t>(columns)};
  with_tf32<compared_t>(allow_tf32, [&](auto tf32) {
    check_cuda(launch_nearest<tf32()>(params, cuda_ptr<scalar_t>(metric), data_ptr<int64_t>(rank), sorted,
                                      data_ptr<acc_t>(similarity), data_ptr<int64_t>(index), stream),
               "nearest_token");
  });
}

}  // namespace

std::tuple<Tensor, Tensor> nearest_cuda(const NearestTokenParams& params, bool allow_tf32, const Tensor& metric,
                                        const Tensor& rank, cudaStream_t stream) {
  Tensor similarity = torch::stable::new_empty(metric, {params.batch, params.tokens}, accumulate_dtype(metric));
  Tensor index = torch::stable::new_empty(metric, {params.batch, params.tokens}, ScalarType::Long);
  TOKENPRUNE_DISPATCH(metric.scalar_type(), "nearest_token", [&] {
    const auto run = params.heads == 1 ? launch_all<scalar_t, scalar_t> : launch_all<scalar_t, accumulate_t<scalar_t>>;
    run(params, allow_tf32, metric, rank, similarity, index, stream);
  });
  return {similarity, index};
}

}  // namespace tokenprune

TOKENPRUNE_CUDA_IMPL(m) { m.impl("nearest_token", TORCH_BOX(&tokenprune::nearest_token_cuda)); }
