// Reduction over heads, one after the other, in a form that the compiler vectorises.
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

}  // namespace tokenprune
