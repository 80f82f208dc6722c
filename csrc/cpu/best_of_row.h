// The candidate with the largest similarity in a row of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "simd.h"

namespace tokenprune {

constexpr int64_t kBestLanes = 16;  // similarities looked at together

// The largest of `count` similarities and the lowest token that has it. NaN is never the largest; without any other
// both results are -1. Writes to the similarities behind the last one, up to a multiple of kBestLanes.
template <typename acc_t>
TOKENPRUNE_MULTIVERSION void find_best(acc_t* __restrict__ similarity, const int32_t* __restrict__ tokens,
                                       int64_t count, acc_t* __restrict__ best, int64_t* __restrict__ index) {
  constexpr acc_t kNone = -std::numeric_limits<acc_t>::infinity();
  constexpr int32_t kNobody = std::numeric_limits<int32_t>::max();
  const int64_t padded = (count + kBestLanes - 1) / kBestLanes * kBestLanes;
  std::fill(similarity + count, similarity + padded, kNone);
  acc_t largest[kBestLanes];
  for (int64_t l = 0; l < kBestLanes; ++l) largest[l] = kNone;
  for (int64_t c = 0; c < padded; c += kBestLanes) {
    for (int64_t l = 0; l < kBestLanes; ++l)
      largest[l] = similarity[c + l] > largest[l] ? similarity[c + l] : largest[l];
  }
  const acc_t found = *std::max_element(largest, largest + kBestLanes);
  int32_t lowest[kBestLanes];
  for (int64_t l = 0; l < kBestLanes; ++l) lowest[l] = kNobody;
  for (int64_t c = 0; c < padded; c += kBestLanes) {
    for (int64_t l = 0; l < kBestLanes; ++l) {
      const int32_t token = similarity[c + l] == found ? tokens[c + l] : kNobody;
      lowest[l] = token < lowest[l] ? token : lowest[l];
    }
  }
  *best = found == kNone ? acc_t(-1) : found;
  *index = found == kNone ? -1 : *std::min_element(lowest, lowest + kBestLanes);
}

}  // namespace tokenprune
