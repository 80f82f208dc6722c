#include "../ops/wpr.h"

#include <optional>
#include <vector>

#include "power_iteration.h"

namespace tokenprune {
namespace {

Tensor wpr_cpu(Tensor attn, std::optional<Tensor> start, int64_t max_iters, double tol) {
  const WprParams params = check_wpr(attn, start, max_iters, tol);
  attn = as_contiguous(attn);
  if (start.has_value()) start = as_contiguous(*start);
  Tensor out = allocate(attn, {attn.size(0), attn.size(1), attn.size(2)}, accumulate_dtype(attn));
  TOKENPRUNE_DISPATCH(attn.scalar_type(), "wpr", [&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto* a = vector_ptr<scalar_t>(attn);
    const acc_t* first = start.has_value() ? data_ptr<acc_t>(*start) : nullptr;
    acc_t* scores = data_ptr<acc_t>(out);
    const int64_t n = params.tokens;
    torch::stable::parallel_for(0, params.matrices, 1, [&](int64_t begin, int64_t end) {
      std::vector<acc_t> next(n);
      for (int64_t m = begin; m < end; ++m) {
        const auto* matrix = a + m * n * n;
        power_start(params, first, m, scores + m * n);
        power_iterate(params, scores + m * n, next.data(),
                      [&](const acc_t* s, acc_t* out_scores) { power_step(matrix, n, s, n, out_scores, n); });
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("wpr", TORCH_BOX(&tokenprune::wpr_cpu)); }
