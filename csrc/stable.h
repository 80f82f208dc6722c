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

#include <algorithm>
#include <cstdint>
#include <initializer_list>

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

// What `torch::stable` has for these looks every operator up by its name, which takes longer than a small kernel.
inline Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[8];
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes.begin()[i], 1)) strides[i] = stride;
  int32_t type = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, code, type, index, &handle));
  return Tensor(handle);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
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
