// What the CPU kernels need so that the compiler vectorises them well in one portable library.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../stable.h"

// The function is compiled for several levels of x86-64 and the best one is picked when the library is loaded. Other
// architectures have their vector unit (NEON) in the baseline.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TOKENPRUNE_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define TOKENPRUNE_MULTIVERSION
#endif

namespace tokenprune {

// Calls f(bytes of a vector register), an always_inline function, compiled for the best level there is: for what is
// written in vectors of that size. Selects between larger ones compilers take apart into single numbers.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(TOKENPRUNE_NARROW_VECTORS)
#define TOKENPRUNE_WIDE_VECTORS
template <typename F>
__attribute__((target("arch=x86-64-v3"))) void with_32_bytes(const F& f) {
  f(std::integral_constant<int, 32>());
}
template <typename F>
__attribute__((target("arch=x86-64-v4"))) void with_64_bytes(const F& f) {
  f(std::integral_constant<int, 64>());
}
#endif
template <typename F>
void with_vectors(const F& f) {
#ifdef TOKENPRUNE_WIDE_VECTORS
  if (__builtin_cpu_supports("x86-64-v4")) return with_64_bytes(f);
  if (__builtin_cpu_supports("x86-64-v3")) return with_32_bytes(f);
#endif
  f(std::integral_constant<int, 16>());
}

// 16-bit floats as types that the compiler converts in vector registers.
struct Bf16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
};

template <typename scalar_t>
struct Vectorizable {
  using type = scalar_t;
};
template <>
struct Vectorizable<torch::headeronly::BFloat16> {
  using type = Bf16;
};
#if defined(__FLT16_MAX__)
template <>
struct Vectorizable<torch::headeronly::Half> {
  using type = _Float16;
};
#endif
template <typename scalar_t>
using vectorizable_t = typename Vectorizable<scalar_t>::type;

template <typename scalar_t>
const vectorizable_t<scalar_t>* vector_ptr(const Tensor& tensor) {
  return static_cast<const vectorizable_t<scalar_t>*>(tensor.data_ptr());
}

// Vectors of kBytes: 64 bytes of them, and how they are filled.
template <int kBytes, typename acc_t>
struct VectorsOf {
  typedef acc_t type __attribute__((vector_size(kBytes), aligned(sizeof(acc_t)), may_alias));
  static constexpr int64_t kLanes = kBytes / static_cast<int64_t>(sizeof(acc_t));
  static constexpr int64_t kCount = 64 / kBytes;
  static constexpr int64_t kSums = kCount * kLanes;

  template <typename value_t>
  [[gnu::always_inline]] static void load(const value_t* from, type& vector) {
    acc_t wide[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) wide[i] = static_cast<acc_t>(from[i]);
    vector = *reinterpret_cast<const type*>(wide);
  }
  [[gnu::always_inline]] static void load(const acc_t* from, type& vector) {
    vector = *reinterpret_cast<const type*>(from);
  }
};

// The sum of term(0) .. term(n - 1), in sixteen parts, which the compiler keeps in registers. For multiversioned
// functions, which have to inline it.
template <typename acc_t, typename Term>
[[gnu::always_inline]] inline acc_t sum_in_parts(int64_t n, const Term& term) {
  constexpr int64_t kParts = 16;
  acc_t parts[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= n; i += kParts) {
    for (int64_t j = 0; j < kParts; ++j) parts[j] += term(i + j);
  }
  for (; i < n; ++i) parts[0] += term(i);
  acc_t sum = 0;
  for (int64_t j = 0; j < kParts; ++j) sum += parts[j];
  return sum;
}

// What two numbers become, or those in the lanes of two vectors.
struct Sum {
  template <typename T>
  [[gnu::always_inline]] static void join(T& a, const T& b) {
    a += b;
  }
};
struct Larger {
  template <typename T>
  [[gnu::always_inline]] static void join(T& a, const T& b) {
    a = b > a ? b : a;
  }
};
struct Lower {
  template <typename T>
  [[gnu::always_inline]] static void join(T& a, const T& b) {
    a = b < a ? b : a;
  }
};

// All lanes of a vector as one number: its halves are joined, and theirs.
template <typename Join, typename vector_t>
[[gnu::always_inline]] inline auto join_lanes(const vector_t& lanes) {
  using lane_t = std::remove_cvref_t<decltype(lanes[0])>;
  if constexpr (sizeof(vector_t) == 2 * sizeof(lane_t)) {
    lane_t joined = lanes[0];
    Join::join(joined, static_cast<lane_t>(lanes[1]));
    return joined;
  } else {
    typedef lane_t half_t __attribute__((vector_size(sizeof(vector_t) / 2)));
    half_t halves[2];
    std::memcpy(halves, &lanes, sizeof(lanes));
    Join::join(halves[0], halves[1]);
    return join_lanes<Join>(halves[0]);
  }
}

// The largest of n numbers, in vectors of kBytes; NaN never is, and without any other it is minus infinity. (For
// with_vectors: loops over arrays, and masks that are joined, GCC takes apart into single numbers.)
template <int kBytes, typename acc_t>
[[gnu::always_inline]] inline acc_t largest_of(const acc_t* row, int64_t n) {
  using Vectors = VectorsOf<kBytes, acc_t>;
  constexpr acc_t kNone = -std::numeric_limits<acc_t>::infinity();
  typename Vectors::type largest = typename Vectors::type{} + kNone;
  int64_t i = 0;
  for (; i + Vectors::kLanes <= n; i += Vectors::kLanes) {
    typename Vectors::type value;
    Vectors::load(row + i, value);
    Larger::join(largest, value);
  }
  acc_t found = join_lanes<Larger>(largest);
  for (; i < n; ++i) Larger::join(found, row[i]);
  return found;
}

// sum += weight * x, n numbers.
template <typename value_t, typename acc_t>
TOKENPRUNE_MULTIVERSION void add_scaled(acc_t weight, const value_t* __restrict__ x, int64_t n,
                                        acc_t* __restrict__ sum) {
  for (int64_t c = 0; c < n; ++c) sum[c] += weight * static_cast<acc_t>(x[c]);
}

}  // namespace tokenprune
