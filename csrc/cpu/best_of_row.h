// The candidate with the largest similarity in a row of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "simd.h"

namespace tokenprune {

constexpr int64_t kBestLanes = 16;  // similarities looked at together

// The lowest token whose similarity is `wanted`, in whole vectors of kBytes.
template <int kBytes, typename acc_t>
[[gnu::always_inline]] inline int64_t lowest_with(acc_t wanted, const acc_t* similarity, const int32_t* tokens,
                                                  int64_t count) {
  using token_t = std::conditional_t<sizeof(acc_t) == 8, int64_t, int32_t>;  // as wide, for the mask
  using Values = VectorsOf<kBytes, acc_t>;
  using Tokens = VectorsOf<kBytes, token_t>;
  const auto nobody = typename Tokens::type{} + std::numeric_limits<token_t>::max();
  auto lowest = nobody;
  for (int64_t c = 0; c < count; c += Values::kLanes) {
    typename Values::type value;
    typename Tokens::type token;
    Values::load(similarity + c, value);
    Tokens::load(tokens + c, token);
    token = value == wanted ? token : nobody;
    Lower::join(lowest, token);
  }
  return join_lanes<Lower>(lowest);
}

// The largest of `count` similarities and the lowest token that has it. NaN is never the largest; without any other
// both results are -1. Writes to the similarities behind the last one, up to a multiple of kBestLanes.
template <typename acc_t>
void find_best(acc_t* __restrict__ similarity, const int32_t* __restrict__ tokens, int64_t count,
               acc_t* __restrict__ best, int64_t* __restrict__ index) {
  constexpr acc_t kNone = -std::numeric_limits<acc_t>::infinity();
  *best = -1;
  *index = -1;
  if (count == 0) return;
  std::fill(similarity + count, similarity + (count + kBestLanes - 1) / kBestLanes * kBestLanes, kNone);
  with_vectors([&](auto bytes) __attribute__((always_inline)) {
    const acc_t found = largest_of<bytes()>(similarity, count);
    if (found == kNone) return;
    *best = found;
    *index = lowest_with<bytes()>(found, similarity, tokens, count);
  });
}

}  // namespace tokenprune
