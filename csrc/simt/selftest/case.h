// A named kernel and what it must, or must not, do. The program runs one case in one order of threads:
//   simt_selftest_races CASE ORDER
// It exits with 0 when the case holds, and with 1 and a message otherwise; the tests say which is expected.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "../../cuda/kernels/common.cuh"

struct Case {
  const char* name;
  void (*run)();
};

std::vector<Case> executor_cases();
std::vector<Case> tensor_core_cases();
std::vector<Case> broken_kernel_cases();

inline void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("wrong result: " + what);
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
