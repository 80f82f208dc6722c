// The only place that knows the torch ABI: the version we build for, checks, dtype dispatch. No other file includes a
// torch header.
#pragma once

// LibTorch stable ABI as of torch 2.10: one library for this and every later torch, and for every Python.
#define TORCH_TARGET_VERSION 0x020a000000000000ULL
#if defined(__CUDACC__) && !defined(USE_CUDA)
#define USE_CUDA
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

static_assert(TORCH_FEATURE_VERSION == TORCH_TARGET_VERSION, "a torch header was included before csrc/stable.h");

namespace tokenprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Sums are formed in float, in double for double.
template <typename scalar_t>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <typename scalar_t>
using accumulate_t = typename AccumulateType<scalar_t>::type;

inline ScalarType accumulate_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
T* data_ptr(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace tokenprune

// Runs the lambda with `scalar_t` as the C++ type of a floating dtype.
#define TOKENPRUNE_DISPATCH(TYPE, NAME, ...)                                                       \
  THO_DISPATCH_SWITCH(TYPE, NAME,                                                                  \
                      THO_DISPATCH_CASE(torch::headeronly::ScalarType::Half, __VA_ARGS__)          \
                          THO_DISPATCH_CASE(torch::headeronly::ScalarType::BFloat16, __VA_ARGS__)  \
                              THO_DISPATCH_CASE(torch::headeronly::ScalarType::Float, __VA_ARGS__) \
                                  THO_DISPATCH_CASE(torch::headeronly::ScalarType::Double, __VA_ARGS__))
