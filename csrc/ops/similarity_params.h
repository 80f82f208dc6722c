#pragma once

#include <limits>

namespace tokenprune {

enum class Similarity { kCosine, kDot, kEuclidean };

// Shorter vectors are divided by this instead of their norm.
constexpr double kMinNorm = 1e-12;

// A token's part in its similarities: for cosine and dot what its products are divided by, for euclidean what is added
// to them: -|x - y|^2 / 2 = x . y - |x|^2 / 2 - |y|^2 / 2. `squares` is the sum over the channels, `norm` its root; NaN
// where a similarity could leave the range.
template <typename acc_t>
constexpr acc_t token_term(Similarity similarity, acc_t squares, acc_t norm) {
  using Limits = std::numeric_limits<acc_t>;
  const bool distance = similarity == Similarity::kEuclidean;
  if (!(squares <= Limits::max() / (distance ? 4 : 1))) return Limits::quiet_NaN();
  if (distance) return -squares / 2;
  const acc_t shortest = static_cast<acc_t>(kMinNorm);
  return similarity == Similarity::kDot ? acc_t(1) : norm < shortest ? shortest : norm;
}

}  // namespace tokenprune
