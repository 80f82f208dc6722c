// Tensor-core instructions, by the fragment layouts of the PTX ISA: every lane brings its registers, and gets its part
// of the product.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>

#include "executor.h"
#include "races.h"

namespace simt {

inline float widen(__half value) { return __half2float(value); }
inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// Two 16-bit numbers a register: which of them, and where in the matrix a lane's register stands.
template <typename value_t>
struct Packed {
  static constexpr int kPerRegister = 2;
  static float number(uint32_t bits, int i) {
    return widen(std::bit_cast<value_t>(static_cast<uint16_t>(bits >> 16 * i)));
  }
};

// One tf32 number a register: a float whose lower 13 bits the hardware does not read.
struct Tf32 {
  static constexpr int kPerRegister = 1;
  static float number(uint32_t bits, int) { return std::bit_cast<float>(bits & 0xffffe000u); }
  static uint32_t round(float value) {  // to the nearest, ties away from zero
    const auto bits = std::bit_cast<uint32_t>(value);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    return (finite ? bits + 0x1000u : bits) & 0xffffe000u;
  }
};

// D += A B with A [16, kDepth] and B [kDepth, 8].
template <int kDepth, typename Number>
struct Fragments {
  struct Slot {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  };

  static void multiply(const char* name, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                       const std::source_location& where) {
    Slot slot{d, a, {b0, b1}};
    warp_call(name, kAllLanes, &slot, &combine, false, where);
  }

 private:
  __attribute__((no_sanitize("thread"))) static void combine(void* const slots[], unsigned,
                                                             const std::source_location&) {
    constexpr int kPer = Number::kPerRegister;
    float a[16][kDepth], b[kDepth][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      const Slot& slot = *static_cast<Slot*>(slots[lane]);
      const int group = lane / 4, member = lane % 4;
      for (int i = 0; i < kPer; ++i) {
        for (int r = 0; r < 4; ++r) {
          a[group + r % 2 * 8][kPer * member + i + r / 2 * (kDepth / 2)] = Number::number(slot.a[r], i);
        }
        for (int r = 0; r < 2; ++r) {
          b[kPer * member + i + r * (kDepth / 2)][group] = Number::number(slot.b[r], i);
        }
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
        static_cast<Slot*>(slots[lane])->d[i] += sum;
      }
    }
  }
};

struct RowSlot {
  const void* row;
  uint32_t* registers;
};

__attribute__((noinline)) inline void load_matrices(uint32_t (&r)[4], const void* row,
                                                    const std::source_location& where) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix reads a row that is not aligned to 16 bytes", where);
  races::read(row, 16, __builtin_return_address(0));
  RowSlot slot{row, r};
  warp_call(
      "ldmatrix", kAllLanes, &slot,
      [](void* const slots[], unsigned, const std::source_location&) {
        for (int lane = 0; lane < kLanes; ++lane) {
          for (int matrix = 0; matrix < 4; ++matrix) {
            const void* from = static_cast<RowSlot*>(slots[8 * matrix + lane / 4])->row;
            static_cast<RowSlot*>(slots[lane])->registers[matrix] = static_cast<const uint32_t*>(from)[lane % 4];
          }
        }
      },
      false, where);
}

}  // namespace simt
