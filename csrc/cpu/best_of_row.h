// The candidate with the largest similarity in a row of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace tokenprune {

constexpr int64_t kBestLanes = 16;  // similarities looked at together

// join(lanes[0], ..., lanes[kLanes - 1]), in pairs.
template <int64_t kLanes, typename vector_t, typename Join>
[[gnu::always_inline]] inline auto join_lanes(const vector_t& lanes, const Join& join) {
  std::remove_cvref_t<decltype(lanes[0])> joined[kLanes];
#pragma GCC unroll 16
  for (int64_t l = 0; l < kLanes; ++l) joined[l] = lanes[l];
#pragma GCC unroll 4
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int64_t l = 0; l < half; ++l) joined[l] = join(joined[l], joined[l + half]);
  }
  return joined[0];
}

// The largest of `count` similarities, or minus infinity, and the lowest token that has it; in vectors of kBytes, whole
// ones. (Loops over arrays, and masks that are joined, GCC takes apart into single numbers.)
template <int kBytes, typename acc_t>
[[gnu::always_inline]] inline std::pair<acc_t, int64_t> largest_of(const acc_t* similarity, const int32_t* tokens,
                                                                   int64_t count) {
  using token_t = std::conditional_t<sizeof(acc_t) == 8, int64_t, int32_t>;  // as wide, for the mask
  using Values = VectorsOf<kBytes, acc_t>;
  using Tokens = VectorsOf<kBytes, token_t>;
  constexpr int64_t kLanes = Values::kLanes;
  auto largest = typename Values::type{} - std::numeric_limits<acc_t>::infinity();
  for (int64_t c = 0; c < count; c += kLanes) {
    typename Values::type value;
    Values::load(similarity + c, value);
    largest = value > largest ? value : largest;
  }
  const acc_t found = join_lanes<kLanes>(largest, [](acc_t a, acc_t b) { return b > a ? b : a; });
  const auto nobody = typename Tokens::type{} + std::numeric_limits<token_t>::max();
  auto lowest = nobody;
  for (int64_t c = 0; c < count; c += kLanes) {
    typename Values::type value;
    typename Tokens::type token;
    Values::load(similarity + c, value);
    Tokens::load(tokens + c, token);
    token = value == found ? token : nobody;
    lowest = token < lowest ? token : lowest;
  }
  return {found, join_lanes<kLanes>(lowest, [](token_t a, token_t b) { return b < a ? b : a; })};
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
    const auto [found, token] = largest_of<bytes()>(similarity, tokens, count);
    if (found == kNone) return;
    *best = found;
    *index = token;
  });
}

}  // namespace tokenprune
