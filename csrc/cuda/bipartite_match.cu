#include <optional>
#include <string>
#include <tuple>

#include "../ops/bipartite_match.h"
#include "adapter.h"
#include "kernels/pairs.cuh"
#include "kernels/select.cuh"
#include "nearest_token.h"
#include "operators.h"

namespace tokenprune {
namespace {

constexpr const char* kOp = "bipartite_match";

// Positions of the best `count` patch tokens, and of the others.
std::tuple<Tensor, Tensor> select_best(const TopkGatherParams& params, const Tensor& scores, cudaStream_t stream) {
  Tensor best = torch::stable::new_empty(scores, {params.batch, params.keep}, ScalarType::Long);
  Tensor others = torch::stable::new_empty(scores, {params.batch, params.dropped()}, ScalarType::Int);
  int64_t* k = data_ptr<int64_t>(best);
  int32_t* d = data_ptr<int32_t>(others);
  check_cuda(scores.scalar_type() == ScalarType::Double ? launch_select(params, data_ptr<double>(scores), k, d, stream)
                                                        : launch_select(params, data_ptr<float>(scores), k, d, stream),
             kOp);
  return {best, others};
}

Tensor find_groups(const BipartiteMatchParams& params, const Tensor& metric, const std::optional<Tensor>& scores,
                   cudaStream_t stream) {
  Tensor group = torch::stable::new_empty(metric, {params.nearest.batch, params.nearest.tokens}, ScalarType::Long);
  if (!scores.has_value()) {
    check_cuda(launch_groups(params, nullptr, nullptr, data_ptr<int64_t>(group), stream), kOp);
    return group;
  }
  // 16-bit scores widen to float exactly, so their order is kept.
  const Tensor wide = torch::stable::contiguous(torch::stable::to(*scores, accumulate_dtype(*scores)));
  const auto [upper, lower] = select_best(params.best(params.important()), wide, stream);
  check_cuda(
      launch_groups(params, data_ptr<int64_t>(upper), data_ptr<int32_t>(lower), data_ptr<int64_t>(group), stream), kOp);
  return group;
}

template <typename acc_t>
Tensor score_pairs(const BipartiteMatchParams& params, const Tensor& group, const Tensor& partner,
                   const Tensor& similarity, cudaStream_t stream) {
  Tensor score = torch::stable::empty_like(similarity);
  check_cuda(launch_pair_scores(params, data_ptr<int64_t>(group), data_ptr<int64_t>(partner),
                                data_ptr<const acc_t>(similarity), data_ptr<acc_t>(score), stream),
             kOp);
  return score;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> bipartite_match_cuda(Tensor metric, std::optional<Tensor> scores, int64_t r,
                                                        int64_t num_prefix, std::string partition,
                                                        std::string similarity_name, bool allow_tf32) {
  const BipartiteMatchParams params = check_bipartite_match(metric, scores, r, num_prefix, partition, similarity_name);
  const CudaScope scope(metric);
  const cudaStream_t stream = scope.stream;
  const Tensor group = find_groups(params, metric, scores, stream);
  const auto [similarity, partner] = nearest_cuda(params.nearest, allow_tf32, metric, group, stream);
  const Tensor score = similarity.scalar_type() == ScalarType::Double
                           ? score_pairs<double>(params, group, partner, similarity, stream)
                           : score_pairs<float>(params, group, partner, similarity, stream);
  const auto [dropped, others] = select_best(params.best(r), score, stream);
  Tensor match = torch::stable::new_empty(metric, {params.nearest.batch, r}, ScalarType::Long);
  Tensor kept = torch::stable::new_empty(metric, {params.nearest.batch, params.kept()}, ScalarType::Long);
  check_cuda(launch_pairs(params, data_ptr<int64_t>(group), data_ptr<int64_t>(partner), data_ptr<int64_t>(dropped),
                          data_ptr<int32_t>(others), data_ptr<int64_t>(match), data_ptr<int64_t>(kept), stream),
             kOp);
  return {dropped, match, kept};
}

}  // namespace tokenprune

TOKENPRUNE_CUDA_IMPL(m) { m.impl("bipartite_match", TORCH_BOX(&tokenprune::bipartite_match_cuda)); }
