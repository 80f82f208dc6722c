#include "../ops/bipartite_match.h"

#include <optional>
#include <string>
#include <tuple>

#include "operators.h"
#include "pairs.h"
#include "simd.h"

namespace tokenprune {

std::tuple<Tensor, Tensor, Tensor> bipartite_match_cpu(Tensor metric, std::optional<Tensor> scores, int64_t r,
                                                       int64_t num_prefix, std::string partition,
                                                       std::string similarity_name, bool) {
  const BipartiteMatchParams params = check_bipartite_match(metric, scores, r, num_prefix, partition, similarity_name);
  const int64_t batch = params.nearest.batch;
  const Tensor values = scores.has_value() ? as_contiguous(*scores) : metric;
  Tensor dropped = allocate(metric, {batch, r}, ScalarType::Long);
  Tensor match = allocate(metric, {batch, r}, ScalarType::Long);
  Tensor kept = allocate(metric, {batch, params.kept()}, ScalarType::Long);
  int64_t* drops = data_ptr<int64_t>(dropped);
  int64_t* matches = data_ptr<int64_t>(match);
  int64_t* keeps = data_ptr<int64_t>(kept);
  const bool wide = accumulate_dtype(metric) == ScalarType::Double;
  const Finish finish = [&](int64_t image, const Found& found) {
    const auto choose = wide ? choose_pairs<double> : choose_pairs<float>;
    choose(params, found, drops + image * r, matches + image * r, keeps + image * params.kept());
  };
  TOKENPRUNE_DISPATCH(values.scalar_type(), "bipartite_match", [&] {
    const auto* s = vector_ptr<scalar_t>(values);
    const Order order = [&](int64_t image, int32_t* tokens, int32_t* columns) {
      order_groups(params, s + image * params.nearest.tokens, tokens, columns);
    };
    search_nearest(params.nearest, metric, order, false, finish);
  });
  return {dropped, match, kept};
}

}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  m.impl("bipartite_match", TORCH_BOX(&tokenprune::bipartite_match_cpu));
}
