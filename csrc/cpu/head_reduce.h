// Reduction over heads, one after the other, in vector registers.
#pragma once

#include <limits>

#include "../ops/head_reduce_params.h"
#include "simd.h"

namespace tokenprune {

// The larger of two values; NaN wins, as in torch. In this form compilers make a maximum and a masked move of it.
template <typename acc_t>
inline acc_t max_nan(acc_t most, acc_t value) {
  const acc_t larger = value > most ? value : most;
  return value == value ? larger : value;
}

// Begins with kNothing. Means are sums here.
template <bool kMax, typename acc_t>
struct HeadReduction {
  static constexpr acc_t kNothing = kMax ? -std::numeric_limits<acc_t>::infinity() : acc_t(0);
  static acc_t join(acc_t reduced, acc_t value) { return kMax ? max_nan(reduced, value) : reduced + value; }
};

// Entries side by side, reduced over the heads in vectors of kBytes. (Arrays, which compilers vectorise as well, they
// keep in memory.)
template <bool kMax, int kBytes, int64_t kWidth, typename acc_t>
struct HeadStrip {
  using Vectors = VectorsOf<kBytes, acc_t>;
  using vector_t = typename Vectors::type;
  static constexpr int64_t kLanes = Vectors::kLanes;
  static constexpr int64_t kVectors = kWidth / kLanes;

  vector_t reduced[kVectors];

  template <typename value_t>
  [[gnu::always_inline]] HeadStrip(const value_t* entries, int64_t heads, int64_t head_stride) {
#pragma GCC unroll 16
    for (int64_t v = 0; v < kVectors; ++v) Vectors::load(entries + v * kLanes, reduced[v]);
    for (int64_t h = 1; h < heads; ++h) {
      entries += head_stride;
#pragma GCC unroll 16
      for (int64_t v = 0; v < kVectors; ++v) {
        vector_t value;
        Vectors::load(entries + v * kLanes, value);
        join(value, reduced[v]);
      }
    }
  }

  // sums[i % kSums] += the reduction of entries i.
  template <int64_t kSums>
  [[gnu::always_inline]] void add_to(acc_t* sums) const {
#pragma GCC unroll 16
    for (int64_t v = 0; v < kVectors; ++v) *reinterpret_cast<vector_t*>(sums + v * kLanes % kSums) += reduced[v];
  }

 private:
  // A NaN in `value` becomes this one: a maximum under a mask. With the one in `value`, compilers compare twice.
  [[gnu::always_inline]] static void join(const vector_t& value, vector_t& reduced) {
    if constexpr (kMax) {
      const vector_t larger = value > reduced ? value : reduced;
      reduced = value == value ? larger : vector_t{} + std::numeric_limits<acc_t>::quiet_NaN();
    } else {
      reduced += value;
    }
  }
};

}  // namespace tokenprune
