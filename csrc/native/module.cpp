// The module `_native`: how this package was built, what the GPUs are and what is launched. No torch, no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#ifdef TOKENPRUNE_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

void bind_launches(py::module_& m);  // launches.cpp

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = TOKENPRUNE_VERSION;
  info["torch"] = TOKENPRUNE_TORCH_VERSION;
  info["torch_abi_target"] = "2.10";
  info["compiler"] = TOKENPRUNE_COMPILER;
#ifdef TOKENPRUNE_WITH_CUDA
  info["cuda"] = TOKENPRUNE_WITH_CUDA;
  info["cuda_archs"] = TOKENPRUNE_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::none();
#endif
  return info;
}

#ifdef TOKENPRUNE_WITH_CUDA
int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, name, device);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  return value;
}
#endif

int device_count() {
#ifdef TOKENPRUNE_WITH_CUDA
  int count = 0;
  // No driver, or none that this runtime can use, is the same answer as no device.
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
#endif
  return 0;
}

py::dict device_properties(int device) {
  if (device < 0 || device >= device_count()) {
    throw py::value_error("device must be in 0.." + std::to_string(device_count() - 1) + ", got " +
                          std::to_string(device) + " (CUDA devices found: " + std::to_string(device_count()) + ")");
  }
  py::dict properties;
#ifdef TOKENPRUNE_WITH_CUDA
  cudaDeviceProp prop;
  const cudaError_t error = cudaGetDeviceProperties(&prop, device);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  properties["name"] = std::string(prop.name);
  properties["compute_capability"] = py::make_tuple(prop.major, prop.minor);
  properties["multiprocessors"] = prop.multiProcessorCount;
  properties["threads_per_multiprocessor"] = prop.maxThreadsPerMultiProcessor;
  properties["registers_per_multiprocessor"] = prop.regsPerMultiprocessor;
  properties["shared_memory_per_multiprocessor"] = prop.sharedMemPerMultiprocessor;
  properties["shared_memory_per_block_optin"] = prop.sharedMemPerBlockOptin;
  properties["l2_cache_bytes"] = prop.l2CacheSize;
  properties["memory_bytes"] = prop.totalGlobalMem;
  properties["clock_khz"] = attribute(cudaDevAttrClockRate, device);
  properties["memory_clock_khz"] = attribute(cudaDevAttrMemoryClockRate, device);
  properties["memory_bus_bits"] = prop.memoryBusWidth;
#endif
  return properties;
}

py::dict cuda_versions() {
  py::dict versions;
#ifdef TOKENPRUNE_WITH_CUDA
  int runtime = 0, driver = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  versions["runtime"] = runtime;
  versions["driver"] = driver;
#endif
  return versions;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "How this package was built, what the GPUs are and what is launched on them.";
  m.def("build_info", &build_info,
        "Versions of the package, of the torch it was built against, of its stable ABI target and of the compilers; "
        "`cuda` is None for a CPU-only build.");
  m.def("cuda_versions", &cuda_versions,
        "CUDA runtime this package is linked to and CUDA the driver supports (0: no driver), as 1000 * major + 10 * "
        "minor; empty for a CPU-only build.");
  m.def("device_count", &device_count, "Number of usable CUDA devices; 0 without a driver.");
  m.def(
      "device_properties", &device_properties, py::arg("device") = 0,
      "Properties of one CUDA device; clocks in kHz, sizes in bytes. Raises ValueError when there is no such device.");
  bind_launches(m);
}
