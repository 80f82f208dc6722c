#include <tuple>

#include "../ops/peaks_match.h"
#include "adapter.h"
#include "kernels/peaks.cuh"
#include "nearest_token.h"

namespace tokenprune {
namespace {

constexpr const char* kOp = "peaks_match";

struct Results {
  Tensor score, kept, dropped, match;
};

template <typename acc_t>
void match_all(const PeaksMatchParams& params, const Tensor& metric, const Tensor& importance, bool allow_tf32,
               const Results& results, cudaStream_t stream) {
  const acc_t* important = data_ptr<acc_t>(importance);
  const Tensor rank = torch::stable::new_empty(metric, {params.nearest.batch, params.nearest.tokens}, ScalarType::Long);
  int64_t* ranks = data_ptr<int64_t>(rank);
  int64_t* dropped = data_ptr<int64_t>(results.dropped);
  check_cuda(launch_ranks(params.nearest, important, ranks, stream), kOp);
  const Tensor near = std::get<0>(nearest_cuda(params.nearest, allow_tf32, metric, rank, stream));
  check_cuda(launch_choose<acc_t>(params, important, data_ptr<acc_t>(near), data_ptr<acc_t>(results.score),
                                  data_ptr<int64_t>(results.kept), dropped, ranks, stream),
             kOp);
  if (params.dropped() == 0) return;
  const Tensor index = std::get<1>(nearest_cuda(params.nearest, allow_tf32, metric, rank, stream));
  check_cuda(launch_matches(params, data_ptr<int64_t>(index), dropped, data_ptr<int64_t>(results.match), stream), kOp);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> peaks_match_cuda(Tensor metric, Tensor importance, int64_t keep,
                                                            int64_t num_prefix, double exponent, bool allow_tf32) {
  const PeaksMatchParams params = check_peaks_match(metric, importance, keep, num_prefix, exponent);
  const CudaScope scope(metric);
  importance = torch::stable::contiguous(importance);
  const int64_t batch = params.nearest.batch;
  const Results results{torch::stable::new_empty(importance, {batch, params.nearest.tokens}),
                        torch::stable::new_empty(importance, {batch, keep}, ScalarType::Long),
                        torch::stable::new_empty(importance, {batch, params.dropped()}, ScalarType::Long),
                        torch::stable::new_empty(importance, {batch, params.dropped()}, ScalarType::Long)};
  if (importance.scalar_type() == ScalarType::Double) {
    match_all<double>(params, metric, importance, allow_tf32, results, scope.stream);
  } else {
    match_all<float>(params, metric, importance, allow_tf32, results, scope.stream);
  }
  return {results.score, results.kept, results.dropped, results.match};
}

}  // namespace
}  // namespace tokenprune

TOKENPRUNE_CUDA_IMPL(m) { m.impl("peaks_match", TORCH_BOX(&tokenprune::peaks_match_cuda)); }
