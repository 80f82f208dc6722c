// What every CUDA adapter does: device guard, current stream, types the kernels know, errors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "../stable.h"

// Where an operator's kernel is registered: on the host, kernels run on CPU tensors as operators of their own
// namespace.
#ifdef TOKENPRUNE_SIMT
#define TOKENPRUNE_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(tokenprune_simt, CPU, m)
#else
#define TOKENPRUNE_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(tokenprune, CUDA, m)
#endif

namespace tokenprune {

#ifdef TOKENPRUNE_SIMT

struct CudaScope {
  explicit CudaScope(const Tensor&) {}
  cudaStream_t stream = nullptr;
};

#else

// For its lifetime the tensor's device is the current one; `stream` is torch's current stream there.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  cudaStream_t stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

#endif

// torch's 16-bit types have the layout of CUDA's.
template <typename scalar_t>
struct CudaType {
  using type = scalar_t;
};
template <>
struct CudaType<torch::headeronly::Half> {
  using type = __half;
};
template <>
struct CudaType<torch::headeronly::BFloat16> {
  using type = __nv_bfloat16;
};

template <typename scalar_t>
typename CudaType<scalar_t>::type* cuda_ptr(const Tensor& tensor) {
  return static_cast<typename CudaType<scalar_t>::type*>(tensor.data_ptr());
}

// Calls `run` with std::true_type where float products may use tf32, and with std::false_type for every other dtype.
template <typename scalar_t, typename Run>
void with_tf32(bool allow, const Run& run) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    if (allow) return run(std::true_type());
  }
  run(std::false_type());
}

inline void check_cuda(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, "tokenprune::", op, ": ", cudaGetErrorString(error));
}

}  // namespace tokenprune
