#include "../ops/wpr.h"

#include <optional>

#include "power_iteration.h"

namespace tokenprune {
namespace {

Tensor wpr_cpu(Tensor attn, std::optional<Tensor> start, int64_t max_iters, double tol) {
  const WprParams params = check_wpr(attn, start, max_iters, tol);
  attn = torch::stable::contiguous(attn);
  if (start.has_value()) start = torch::stable::contiguous(*start);
  const auto dtype = accumulate_dtype(attn);
  Tensor out = torch::stable::new_empty(attn, {attn.size(0), attn.size(1), attn.size(2)}, dtype);
  Tensor scratch = torch::stable::new_empty(attn, {params.matrices, params.tokens}, dtype);
  TOKENPRUNE_DISPATCH(attn.scalar_type(), "wpr", [&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto* a = vector_ptr<scalar_t>(attn);
    const acc_t* first = start.has_value() ? data_ptr<acc_t>(*start) : nullptr;
    acc_t* scores = data_ptr<acc_t>(out);
    acc_t* next = data_ptr<acc_t>(scratch);
    const int64_t n = params.tokens;
    torch::stable::parallel_for(0, params.matrices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const auto* matrix = a + m * n * n;
        power_start(params, first, m, scores + m * n);
        power_iterate(params, scores + m * n, next + m * n,
                      [&](const acc_t* s, acc_t* out_scores) { power_step(matrix, n, s, n, out_scores, n); });
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("wpr", TORCH_BOX(&tokenprune::wpr_cpu)); }
