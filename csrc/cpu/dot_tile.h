// Dot products of a few rows with many columns, as the inner loop of whatever would otherwise need a matrix of them:
// attention logits, similarities. The columns (keys) are packed once; the products of a block of rows go to a small
// buffer.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace tokenprune {

// Columns are packed in panels as wide as two vector registers of 64 bytes: panel p holds, for every channel, the
// columns p * width .. p * width + width - 1 side by side. Columns beyond the last one are zeros.
template <typename acc_t>
constexpr int64_t panel_width() {
  return 2 * 64 / static_cast<int64_t>(sizeof(acc_t));
}
template <typename acc_t>
constexpr int64_t padded_columns(int64_t n) {
  return (n + panel_width<acc_t>() - 1) / panel_width<acc_t>() * panel_width<acc_t>();
}

// The channels of tokens, of all or, by their positions, of some.
template <typename value_t>
struct TokenRows {
  const value_t* data;
  int64_t stride;                  // between tokens
  const int64_t* taken = nullptr;  // row r is token taken[r]; null: token r

  [[gnu::always_inline]] const value_t* operator[](int64_t r) const { return data + (taken ? taken[r] : r) * stride; }
};

// Of two vectors: the halves of every pair of kHalf lanes that both have on the same side, and those on the other.
template <int kHalf, typename vector_t, size_t... lane>
[[gnu::always_inline]] inline void swap_halves(vector_t& a, vector_t& b, std::index_sequence<lane...> lanes) {
  const vector_t first = a;
  a = __builtin_shufflevector(first, b, (lane & kHalf ? lanes.size() + lane - kHalf : lane)...);
  b = __builtin_shufflevector(first, b, (lane & kHalf ? lanes.size() + lane : lane + kHalf)...);
}

// Element c of vector r becomes element r of vector c: first between the halves of the block, then within them.
template <int kHalf, int kLanes, typename vector_t>
[[gnu::always_inline]] inline void transpose(vector_t (&block)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & kHalf)) swap_halves<kHalf>(block[i], block[i + kHalf], std::make_index_sequence<kLanes>());
  }
  if constexpr (kHalf > 1) transpose<kHalf / 2>(block);
}

// One panel of `width` rows: blocks of as many rows and channels as a vector has lanes, with zeros for what is missing.
template <int kBytes, typename value_t, typename acc_t>
[[gnu::always_inline]] inline void pack_panel(const TokenRows<value_t>& rows, int64_t first, int64_t width, int64_t d,
                                              acc_t* __restrict__ panel) {
  using Vectors = VectorsOf<kBytes, acc_t>;
  constexpr int64_t kWidth = panel_width<acc_t>();
  constexpr int kLanes = Vectors::kLanes;
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) {
    for (int64_t j = 0; j < kWidth; j += kLanes) {
      typename Vectors::type block[kLanes] = {};
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        if (j + r < width) Vectors::load(rows[first + j + r] + c, block[r]);
      }
      transpose<kLanes / 2>(block);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        *reinterpret_cast<typename Vectors::type*>(panel + (c + r) * kWidth + j) = block[r];
      }
    }
  }
  for (; c < d; ++c) {
    for (int64_t j = 0; j < kWidth; ++j) {
      panel[c * kWidth + j] = j < width ? static_cast<acc_t>(rows[first + j][c]) : acc_t(0);
    }
  }
}

// n rows of d channels -> panels: padded_columns(n) * d numbers.
template <typename value_t, typename acc_t>
void pack_columns(const TokenRows<value_t>& rows, int64_t n, int64_t d, acc_t* panels) {
  constexpr int64_t kWidth = panel_width<acc_t>();
  with_vectors([&](auto bytes) __attribute__((always_inline)) {
    for (int64_t first = 0; first < n; first += kWidth) {
      const int64_t width = std::min(kWidth, n - first);
      pack_panel<bytes()>(rows, first, width, d, panels + first * d);
    }
  });
}

// Rows of numbers in memory: number c of row r is data[r * row_stride + c * channel_stride].
template <typename acc_t>
struct Rows {
  const acc_t* data;
  int64_t row_stride;
  int64_t channel_stride = 1;
};

// out[r * out_stride + c] = factor * (row r . column c) for kRows rows and the first kHalves halves of a panel.
template <int kRows, int kHalves, typename acc_t>
[[gnu::always_inline]] inline void dot_panel(const acc_t* __restrict__ rows, int64_t row_stride, int64_t channel_stride,
                                             const acc_t* __restrict__ panel, int64_t d, acc_t factor,
                                             acc_t* __restrict__ out, int64_t out_stride) {
  constexpr int64_t kWidth = panel_width<acc_t>();
  typedef acc_t vector_t __attribute__((vector_size(64), aligned(sizeof(acc_t)), may_alias));
  vector_t sums[kHalves][kRows] = {};
  for (int64_t c = 0; c < d; ++c, panel += kWidth, rows += channel_stride) {
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) {
      const vector_t columns = *reinterpret_cast<const vector_t*>(panel + half * kWidth / 2);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[half][r] += rows[r * row_stride] * columns;
    }
  }
#pragma GCC unroll 2
  for (int half = 0; half < kHalves; ++half) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      *reinterpret_cast<vector_t*>(out + r * out_stride + half * kWidth / 2) = sums[half][r] * factor;
    }
  }
}

// The same for any number of rows, kRows at a time, and the first n columns of all panels, both rounded up: columns to
// half a panel. All rows pass by a panel while it is in the first-level cache.
template <int kRows, typename acc_t>
TOKENPRUNE_MULTIVERSION void dot_rows(const Rows<acc_t>& rows, int64_t num_rows, const acc_t* __restrict__ panels,
                                      int64_t d, int64_t n, acc_t factor, acc_t* __restrict__ out, int64_t out_stride) {
  constexpr int64_t kWidth = panel_width<acc_t>();
  const auto pass = [&](auto halves, int64_t first) __attribute__((always_inline)) {
    for (int64_t r = 0; r < num_rows; r += kRows) {
      dot_panel<kRows, halves()>(rows.data + r * rows.row_stride, rows.row_stride, rows.channel_stride,
                                 panels + first * d, d, factor, out + r * out_stride + first, out_stride);
    }
  };
  int64_t first = 0;
  for (; first + kWidth / 2 < n; first += kWidth) pass(std::integral_constant<int, 2>(), first);
  if (first < n) pass(std::integral_constant<int, 1>(), first);
}

// Rows whose sums fit the registers together.
inline int64_t rows_at_once() {
#ifdef TOKENPRUNE_WIDE_VECTORS
  if (__builtin_cpu_supports("x86-64-v4")) return 8;
#endif
  return 4;
}

// The same with as many rows at a time as have room for their sums in the registers.
template <typename acc_t>
void dot_block(const Rows<acc_t>& rows, int64_t num_rows, const acc_t* panels, int64_t d, int64_t n, acc_t factor,
               acc_t* out, int64_t out_stride) {
  if (rows_at_once() >= 8) return dot_rows<8>(rows, num_rows, panels, d, n, factor, out, out_stride);
  dot_rows<4>(rows, num_rows, panels, d, n, factor, out, out_stride);
}

}  // namespace tokenprune
