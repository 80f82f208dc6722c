#include <cmath>
#include <optional>
#include <string>

#include "../ops/zero_tprune.h"
#include "adapter.h"
#include "kernels/zero_tprune.cuh"
#include "operators.h"

namespace tokenprune {
namespace {

struct Cuda {
  static constexpr auto wpr_qk = wpr_qk_cuda;
  static constexpr auto head_aggregate = head_aggregate_cuda;
  static constexpr auto bipartite_match = bipartite_match_cuda;

  static std::optional<Tensor> start(const ZeroTPruneParams& params, const Tensor& q, int64_t tokens) {
    if (!params.class_start) return std::nullopt;
    const CudaScope scope(q);
    const double class_token = std::sqrt(static_cast<double>(tokens));
    Tensor scores = torch::stable::new_empty(q, {tokens}, accumulate_dtype(q));
    check_cuda(scores.scalar_type() == ScalarType::Double
                   ? launch_start(class_token, tokens, data_ptr<double>(scores), scope.stream)
                   : launch_start(static_cast<float>(class_token), tokens, data_ptr<float>(scores), scope.stream),
               "zero_tprune");
    return scores;
  }

  static Tensor spread(const ZeroTPruneParams& params, const Tensor& left, const Tensor& kept) {
    const CudaScope scope(left);
    Tensor scores = torch::stable::new_empty(left, {params.qk.batch, params.qk.tokens});
    const int64_t* positions = data_ptr<const int64_t>(kept);
    check_cuda(
        left.scalar_type() == ScalarType::Double
            ? launch_spread(params, data_ptr<const double>(left), positions, data_ptr<double>(scores), scope.stream)
            : launch_spread(params, data_ptr<const float>(left), positions, data_ptr<float>(scores), scope.stream),
        "zero_tprune");
    return scores;
  }
};

ZeroTPruneResults zero_tprune_cuda(Tensor q, Tensor k, Tensor metric, double scale, int64_t r, bool class_start,
                                   int64_t max_iters, double tol, double vmin, double vmax, int64_t num_prefix,
                                   std::string partition, std::string similarity, bool allow_tf32) {
  const ZeroTPruneParams params = check_zero_tprune(q, k, metric, scale, r, class_start, max_iters, tol, vmin, vmax,
                                                    num_prefix, partition, similarity);
  return run_stages<Cuda>(params, q, k, metric, partition, similarity, allow_tf32);
}

}  // namespace
}  // namespace tokenprune

TOKENPRUNE_CUDA_IMPL(m) { m.impl("zero_tprune", TORCH_BOX(&tokenprune::zero_tprune_cuda)); }
