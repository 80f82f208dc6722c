#include "../ops/head_aggregate.h"

#include "head_aggregate.h"
#include "operators.h"

namespace tokenprune {

Tensor head_aggregate_cpu(Tensor scores, double vmin, double vmax, int64_t num_prefix) {
  const HeadAggregateParams params = check_head_aggregate(scores, vmin, vmax, num_prefix);
  scores = as_contiguous(scores);
  Tensor out = allocate(scores, {params.batch, params.tokens}, accumulate_dtype(scores));
  TOKENPRUNE_DISPATCH(scores.scalar_type(), "head_aggregate", [&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto* s = vector_ptr<scalar_t>(scores);
    acc_t* combined = data_ptr<acc_t>(out);
    torch::stable::parallel_for(0, params.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        aggregate(params, s + image * params.heads * params.tokens, combined + image * params.tokens);
      }
    });
  });
  return out;
}

}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("head_aggregate", TORCH_BOX(&tokenprune::head_aggregate_cpu)); }
