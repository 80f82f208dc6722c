// D = A B with the tensor-core instructions, against three loops: operands read by ldmatrix or placed by hand.
#include <random>

#include "case.h"

using namespace tokenprune;

namespace {

template <typename value_t>
__global__ void multiply_kernel(const value_t* a, const value_t* b, float* d) {  // [16, 16], [8, 16], [16, 8]
  auto* staged = reinterpret_cast<value_t*>(dynamic_shared());                   // a, then b
  for (int i = threadIdx.x; i < 256; i += kWarpSize) staged[i] = a[i];
  for (int i = threadIdx.x; i < 128; i += kWarpSize) staged[256 + i] = b[i];
  __syncwarp();
  const int lane = threadIdx.x;
  uint32_t fragment[4], other[4];
  ldmatrix_x4(fragment, staged + (lane % 16) * 16 + lane / 16 * 8);
  ldmatrix_x4(other, staged + 256 + (lane % 8) * 16 + lane / 8 % 2 * 8);  // the second half again
  float sums[4] = {};
  mma_m16n8k16<value_t>(sums, fragment, other[0], other[1]);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

__global__ void multiply_tf32_kernel(const float* a, const float* b, float* d) {  // [16, 8], [8, 8], [16, 8]
  const int row = threadIdx.x / 4, column = threadIdx.x % 4;
  const uint32_t fragment[4] = {to_tf32(a[row * 8 + column]), to_tf32(a[(row + 8) * 8 + column]),
                                to_tf32(a[row * 8 + column + 4]), to_tf32(a[(row + 8) * 8 + column + 4])};
  float sums[4] = {};
  mma_m16n8k8_tf32(sums, fragment, to_tf32(b[row * 8 + column]), to_tf32(b[row * 8 + column + 4]));
  for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + column * 2 + i % 2] = sums[i];
}

float value_of(float value) { return value; }
float value_of(__half value) { return __half2float(value); }
float value_of(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename value_t, int kDepth>
void multiply(void (*kernel)(const value_t*, const value_t*, float*), double tolerance) {
  std::mt19937 generator(3);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<value_t> a(16 * kDepth), b(8 * kDepth);
  for (auto& value : a) value = static_cast<value_t>(uniform(generator));
  for (auto& value : b) value = static_cast<value_t>(uniform(generator));
  std::vector<float> d(128);
  check(launch(kernel, 1, 32, 1024, nullptr, a.data(), b.data(), d.data()));
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      double truth = 0;
      for (int k = 0; k < kDepth; ++k) {
        truth += static_cast<double>(value_of(a[i * kDepth + k])) * value_of(b[j * kDepth + k]);
      }
      const double off = truth - d[i * 8 + j];
      expect(-tolerance < off && off < tolerance, "row " + std::to_string(i) + ", column " + std::to_string(j));
    }
  }
}

}  // namespace

std::vector<Case> tensor_core_cases() {
  return {{"mma_half", [] { multiply<__half, 16>(multiply_kernel<__half>, 1e-5); }},
          {"mma_bfloat16", [] { multiply<__nv_bfloat16, 16>(multiply_kernel<__nv_bfloat16>, 1e-5); }},
          {"mma_tf32", [] { multiply<float, 8>(multiply_tf32_kernel, 1e-2); }}};
}
