// Tiles of A B^T, 64 x 64, for kernels that need every product of two sets of rows (queries and keys, tokens and
// tokens) and must not store the matrix of them. The block stages two tiles of rows in shared memory, some channels at
// a time; each warp then owns 16 rows of the result and some of its columns, in registers.
#pragma once

#include "common.cuh"

namespace tokenprune {
namespace tile {

constexpr int kRows = 64;      // rows of A, and of B, in a tile
constexpr int kThreads = 128;  // of a block, or a multiple of it: then several warps share the columns of 16 rows
constexpr int kWarpRows = 16;
constexpr int kRowWarps = kRows / kWarpRows;

// `count` rows of numbers side by side, `stride` numbers apart.
template <typename value_t>
struct Rows {
  const value_t* data;
  int64_t stride;
  int64_t count;
};

// A warp's part of the result: 16 rows and kBlockThreads / 128 parts of the 64 columns, in groups of 8. With g = lane /
// 4 and t = lane % 4, counted from the warp's first row and column:
//   value[j][0], value[j][1]  row g      columns 8 j + 2 t, 8 j + 2 t + 1
//   value[j][2], value[j][3]  row g + 8  the same columns
template <typename acc_t, int kBlockThreads = kThreads>
struct Fragment {
  static constexpr int kGroups = kRows / 8 / (kBlockThreads / kThreads);
  acc_t value[kGroups][4];

  // Where value[j][i] of the running thread stands in the tile.
  __device__ static int row(int i) {
    return threadIdx.x / kWarpSize % kRowWarps * kWarpRows + threadIdx.x % kWarpSize / 4 + i / 2 * 8;
  }
  __device__ static int column(int j, int i) {
    return threadIdx.x / kWarpSize / kRowWarps * kGroups * 8 + 8 * j + threadIdx.x % 4 * 2 + i % 2;
  }
};

// How products are formed: on tensor cores for 16-bit numbers; for float on tensor cores as tf32 or exactly; for double
// exactly. Sums are always in float, for double in double.
enum class Math { kTensor16, kTf32, kExact };
template <typename value_t, bool kTf32>
constexpr Math math_of() {
  if (sizeof(value_t) == 2) return Math::kTensor16;
  return kTf32 && sizeof(value_t) == 4 ? Math::kTf32 : Math::kExact;
}

// Channels are staged in chunks of 128 bytes a row. The distance between staged rows keeps lanes that read eight rows
// at once in different banks, and rows aligned to 16 bytes.
template <typename value_t>
constexpr int kChunk = 128 / static_cast<int>(sizeof(value_t));
template <typename value_t>
constexpr int kStride = kChunk<value_t> + 16 / static_cast<int>(sizeof(value_t));

// Shared memory that product() needs.
template <typename value_t>
constexpr int64_t shared_bytes() {
  return 2 * static_cast<int64_t>(kRows) * kStride<value_t> * static_cast<int64_t>(sizeof(value_t));
}

// Rows first .. first + 63, channels begin .. begin + kChunk - 1, to shared memory; zeros beyond the last row, and up
// to `padded` channels beyond the last channel. With `vectors` the copies are asynchronous.
template <int kBlockThreads, typename value_t>
__device__ void stage(value_t* staged, const Rows<value_t>& rows, int64_t first, int begin, int channels, int padded,
                      bool vectors) {
  if (vectors) {
    constexpr int kPerCopy = 16 / static_cast<int>(sizeof(value_t));
    const int copies = padded / kPerCopy;
    for (int i = threadIdx.x; i < kRows * copies; i += kBlockThreads) {
      const int row = i / copies;
      const int c = i % copies * kPerCopy;
      const bool valid = first + row < rows.count && begin + c < channels;
      const value_t* from = valid ? rows.data + (first + row) * rows.stride + begin + c : rows.data;
      cp_async_16(staged + row * kStride<value_t> + c, from, valid);
    }
  } else {
    for (int i = threadIdx.x; i < kRows * padded; i += kBlockThreads) {
      const int row = i / padded;
      const int c = i % padded;
      const bool valid = first + row < rows.count && begin + c < channels;
      staged[row * kStride<value_t> + c] =
          valid ? rows.data[(first + row) * rows.stride + begin + c] : static_cast<value_t>(0.0f);
    }
  }
}

// Adds the products of `padded` staged channels. `a` is the warp's first row, `b` its first column.
template <bool kTf32, typename value_t, typename acc_t, int kGroups>
__device__ void multiply(const value_t* a, const value_t* b, int padded, acc_t (&out)[kGroups][4]) {
  constexpr Math kMath = math_of<value_t, kTf32>();
  constexpr int kRow = kStride<value_t>;
  const int lane = threadIdx.x % kWarpSize;
  const int g = lane / 4;
  const int t = lane % 4;
  if constexpr (kMath == Math::kTensor16) {
    for (int c = 0; c < padded; c += 16) {
      uint32_t rows[4];
      ldmatrix_x4(rows, a + lane % 16 * kRow + c + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < kGroups; j += 2) {  // 16 columns: both halves of the channels, then the next 8 columns
        uint32_t columns[4];
        ldmatrix_x4(columns, b + (8 * j + lane / 16 * 8 + lane % 8) * kRow + c + lane / 8 % 2 * 8);
        mma_m16n8k16<value_t>(out[j], rows, columns[0], columns[1]);
        mma_m16n8k16<value_t>(out[j + 1], rows, columns[2], columns[3]);
      }
    }
  } else if constexpr (kMath == Math::kTf32) {
    for (int c = t; c < padded; c += 8) {
      const uint32_t rows[4] = {to_tf32(a[g * kRow + c]), to_tf32(a[(g + 8) * kRow + c]), to_tf32(a[g * kRow + c + 4]),
                                to_tf32(a[(g + 8) * kRow + c + 4])};
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        const value_t* column = b + (8 * j + g) * kRow + c;
        mma_m16n8k8_tf32(out[j], rows, to_tf32(column[0]), to_tf32(column[4]));
      }
    }
  } else {
    for (int c = 0; c < padded; ++c) {
      const acc_t upper = a[g * kRow + c];
      const acc_t lower = a[(g + 8) * kRow + c];
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const acc_t column = b[(8 * j + 2 * t + i) * kRow + c];
          out[j][i] += upper * column;
          out[j][i + 2] += lower * column;
        }
      }
    }
  }
}

// The products of rows a_first .. a_first + 63 of A with rows b_first .. b_first + 63 of B; zeros beyond the last rows.
// `shared` has shared_bytes(). All threads of the block take part; it begins with a barrier, and `shared` may be used
// for other things again after the next one.
template <bool kTf32, typename value_t, typename acc_t, int kBlockThreads>
__device__ void product(unsigned char* shared, const Rows<value_t>& a, int64_t a_first, const Rows<value_t>& b,
                        int64_t b_first, int channels, bool vectors, Fragment<acc_t, kBlockThreads>& out) {
  constexpr int kStep = sizeof(value_t) == 2 ? 16 : 8;  // channels of one instruction
  value_t* staged_a = reinterpret_cast<value_t*>(shared);
  value_t* staged_b = staged_a + kRows * kStride<value_t>;
#pragma unroll
  for (int j = 0; j < out.kGroups; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out.value[j][i] = 0;
  }
  for (int begin = 0; begin < channels; begin += kChunk<value_t>) {
    const int left = channels - begin < kChunk<value_t> ? channels - begin : kChunk<value_t>;
    const int padded = ceil_div(left, kStep) * kStep;
    __syncthreads();  // the staged rows may still be read
    stage<kBlockThreads>(staged_a, a, a_first, begin, channels, padded, vectors);
    stage<kBlockThreads>(staged_b, b, b_first, begin, channels, padded, vectors);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    multiply<kTf32>(staged_a + out.row(0) / kWarpRows * kWarpRows * kStride<value_t>,
                    staged_b + threadIdx.x / kWarpSize / kRowWarps * out.kGroups * 8 * kStride<value_t>, padded,
                    out.value);
  }
}

}  // namespace tile
}  // namespace tokenprune
