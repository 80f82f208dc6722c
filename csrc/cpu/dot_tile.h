// Dot products of a few rows with many columns, as the inner loop of whatever would otherwise need a matrix of them:
// attention logits, similarities. The columns (keys) are packed once; the products of a block of rows go to a small
// buffer.
#pragma once

#include <algorithm>

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

// rows: n rows of d channels, `row_stride` apart -> panels: padded_columns(n) * d numbers.
template <typename value_t, typename acc_t>
TOKENPRUNE_MULTIVERSION void pack_columns(const value_t* __restrict__ rows, int64_t row_stride, int64_t n, int64_t d,
                                          acc_t* __restrict__ panels) {
  constexpr int64_t kWidth = panel_width<acc_t>();
  for (int64_t first = 0; first < n; first += kWidth, panels += kWidth * d) {
    const int64_t width = std::min(kWidth, n - first);
    if (width < kWidth) std::fill_n(panels, kWidth * d, acc_t(0));
    for (int64_t j = 0; j < width; ++j) {
      const value_t* row = rows + (first + j) * row_stride;
      for (int64_t c = 0; c < d; ++c) panels[c * kWidth + j] = static_cast<acc_t>(row[c]);
    }
  }
}

// out[r * out_stride + c] = factor * (rows[r] . column c) for kRows rows, `rows_stride` apart, and all padded columns.
template <int kRows, typename acc_t>
TOKENPRUNE_MULTIVERSION void dot_rows(const acc_t* __restrict__ rows, int64_t rows_stride,
                                      const acc_t* __restrict__ panels, int64_t d, int64_t n, acc_t factor,
                                      acc_t* __restrict__ out, int64_t out_stride) {
  constexpr int64_t kWidth = panel_width<acc_t>();
  typedef acc_t vector_t __attribute__((vector_size(64), aligned(sizeof(acc_t)), may_alias));
  for (int64_t first = 0; first < n; first += kWidth, panels += kWidth * d) {
    vector_t low[kRows] = {}, high[kRows] = {};
    const acc_t* panel = panels;
    for (int64_t c = 0; c < d; ++c, panel += kWidth) {
      const vector_t left = *reinterpret_cast<const vector_t*>(panel);
      const vector_t right = *reinterpret_cast<const vector_t*>(panel + kWidth / 2);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        low[r] += rows[r * rows_stride + c] * left;
        high[r] += rows[r * rows_stride + c] * right;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      *reinterpret_cast<vector_t*>(out + r * out_stride + first) = low[r] * factor;
      *reinterpret_cast<vector_t*>(out + r * out_stride + first + kWidth / 2) = high[r] * factor;
    }
  }
}

// The same for any number of rows.
template <typename acc_t>
void dot_block(const acc_t* rows, int64_t num_rows, int64_t rows_stride, const acc_t* panels, int64_t d, int64_t n,
               acc_t factor, acc_t* out, int64_t out_stride) {
  constexpr int kRows = 4;
  int64_t r = 0;
  for (; r + kRows <= num_rows; r += kRows) {
    dot_rows<kRows>(rows + r * rows_stride, rows_stride, panels, d, n, factor, out + r * out_stride, out_stride);
  }
  for (; r < num_rows; ++r) {
    dot_rows<1>(rows + r * rows_stride, rows_stride, panels, d, n, factor, out + r * out_stride, out_stride);
  }
}

}  // namespace tokenprune
