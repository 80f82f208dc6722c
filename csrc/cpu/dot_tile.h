// Dot products of a few rows with many columns, as the inner loop of whatever would otherwise need a matrix of them:
// attention logits, similarities. The columns (keys) are packed once; the products of a block of rows go to a small
// buffer.
#pragma once

#include <algorithm>
#include <type_traits>

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

// Four rows of four numbers become four columns.
template <typename value_t, typename acc_t>
[[gnu::always_inline]] inline void transpose_4x4(const value_t* __restrict__ rows, int64_t row_stride,
                                                 acc_t* __restrict__ columns, int64_t column_stride) {
  typedef acc_t quad_t __attribute__((vector_size(4 * sizeof(acc_t)), aligned(sizeof(acc_t)), may_alias));
  quad_t row[4];
#pragma GCC unroll 4
  for (int64_t r = 0; r < 4; ++r) {
    const value_t* from = rows + r * row_stride;
    row[r] = quad_t{static_cast<acc_t>(from[0]), static_cast<acc_t>(from[1]), static_cast<acc_t>(from[2]),
                    static_cast<acc_t>(from[3])};
  }
  const quad_t low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const quad_t low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const quad_t high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const quad_t high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  const auto column = [&](int64_t c) { return reinterpret_cast<quad_t*>(columns + c * column_stride); };
  *column(0) = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  *column(1) = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  *column(2) = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  *column(3) = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}

// rows: n rows of d channels, `row_stride` apart -> panels: padded_columns(n) * d numbers.
template <typename value_t, typename acc_t>
TOKENPRUNE_MULTIVERSION void pack_columns(const value_t* __restrict__ rows, int64_t row_stride, int64_t n, int64_t d,
                                          acc_t* __restrict__ panels) {
  constexpr int64_t kWidth = panel_width<acc_t>();
  for (int64_t first = 0; first < n; first += kWidth, rows += kWidth * row_stride, panels += kWidth * d) {
    const int64_t width = std::min(kWidth, n - first);
    if (width < kWidth) std::fill_n(panels, kWidth * d, acc_t(0));
    const int64_t whole_rows = width / 4 * 4;
    const int64_t whole_channels = d / 4 * 4;
    for (int64_t c = 0; c < whole_channels; c += 4) {
      for (int64_t j = 0; j < whole_rows; j += 4) {
        transpose_4x4(rows + j * row_stride + c, row_stride, panels + c * kWidth + j, kWidth);
      }
    }
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t c = j < whole_rows ? whole_channels : 0; c < d; ++c) {
        panels[c * kWidth + j] = static_cast<acc_t>(rows[j * row_stride + c]);
      }
    }
  }
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

// The same for the first n columns of all panels, rounded up to half a panel.
template <int kRows, typename acc_t>
TOKENPRUNE_MULTIVERSION void dot_rows(const acc_t* __restrict__ rows, int64_t row_stride, int64_t channel_stride,
                                      const acc_t* __restrict__ panels, int64_t d, int64_t n, acc_t factor,
                                      acc_t* __restrict__ out, int64_t out_stride) {
  constexpr int64_t kWidth = panel_width<acc_t>();
  int64_t first = 0;
  for (; first + kWidth / 2 < n; first += kWidth, panels += kWidth * d) {
    dot_panel<kRows, 2>(rows, row_stride, channel_stride, panels, d, factor, out + first, out_stride);
  }
  if (first < n) dot_panel<kRows, 1>(rows, row_stride, channel_stride, panels, d, factor, out + first, out_stride);
}

// Rows whose sums fit the registers together.
inline int64_t rows_at_once() {
#ifdef TOKENPRUNE_WIDE_VECTORS
  if (__builtin_cpu_supports("x86-64-v4")) return 8;
#endif
  return 4;
}

// The same for any number of rows.
template <typename acc_t>
void dot_block(const Rows<acc_t>& rows, int64_t num_rows, const acc_t* panels, int64_t d, int64_t n, acc_t factor,
               acc_t* out, int64_t out_stride) {
  int64_t r = 0;
  const auto run = [&](auto count) {
    for (; r + count() <= num_rows; r += count()) {
      dot_rows<count()>(rows.data + r * rows.row_stride, rows.row_stride, rows.channel_stride, panels, d, n, factor,
                        out + r * out_stride, out_stride);
    }
  };
  if (rows_at_once() >= 8) run(std::integral_constant<int, 8>());
  run(std::integral_constant<int, 4>());
  run(std::integral_constant<int, 1>());
}

}  // namespace tokenprune
