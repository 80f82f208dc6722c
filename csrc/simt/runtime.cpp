// The calls of the CUDA runtime that the launchers make, answered for one of the devices the wheel has code for.
#include <cuda_runtime_api.h>

#include <map>
#include <stdexcept>
#include <string>

#include "executor.h"
#include "symbols.h"

namespace {

struct Device {
  std::map<cudaDeviceAttr, int> attributes;
  int ptx_version;  // of the code it runs
};

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and the devices' data sheets.
Device device(int major, int minor, int multiprocessors, int shared_per_block, int shared_per_multiprocessor,
              int threads_per_multiprocessor) {
  return {{{cudaDevAttrComputeCapabilityMajor, major},
           {cudaDevAttrComputeCapabilityMinor, minor},
           {cudaDevAttrMultiProcessorCount, multiprocessors},
           {cudaDevAttrMaxSharedMemoryPerBlock, 48 * 1024},
           {cudaDevAttrMaxSharedMemoryPerBlockOptin, shared_per_block * 1024},
           {cudaDevAttrMaxSharedMemoryPerMultiprocessor, shared_per_multiprocessor * 1024},
           {cudaDevAttrMaxThreadsPerMultiProcessor, threads_per_multiprocessor},
           {cudaDevAttrClusterLaunch, major >= 9}},
          10 * major + minor};
}

Device with_ptx(Device device, int version) {
  device.ptx_version = version;
  return device;
}

const std::map<std::string, Device> kDevices = {
    {"sm_80", device(8, 0, 108, 163, 164, 2048)},  // A100
    {"sm_87", device(8, 7, 16, 163, 164, 1536)},   // Jetson AGX Orin
    {"sm_90", device(9, 0, 132, 227, 228, 2048)},  // H100, H200
    {"sm_90, PTX of sm_80", with_ptx(device(9, 0, 132, 227, 228, 2048), 80)},
    {"sm_90, 4 multiprocessors", device(9, 0, 4, 227, 228, 2048)},  // a part of one, smaller than there are
};
const Device* present = &kDevices.at("sm_80");

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = present->attributes.at(attribute);  // out_of_range: add the attribute above
  return cudaSuccess;
}

cudaError_t cudaFuncGetName(const char** name, const void* kernel) {
  static std::map<const void*, std::string> names;
  std::string& found = names[kernel];
  if (found.empty()) {
    const auto lines = simt::addr2line("-f", kernel);
    if (lines.empty()) return cudaErrorInvalidDeviceFunction;
    found = lines.front();
  }
  *name = found.c_str();
  return cudaSuccess;
}

// Only ptxas knows what a kernel takes, and with it how many blocks a multiprocessor holds: 0 stands for that.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = present->ptx_version;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  const bool shared = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  const int most = present->attributes.at(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return shared && value <= most ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  const auto blocks = static_cast<int>(config->attrs->val.clusterDim.x);
  *clusters = present->attributes.at(cudaDevAttrMultiProcessorCount) / blocks;
  return *clusters > 0 ? cudaSuccess : cudaErrorInvalidClusterSize;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 0;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  return error == cudaErrorInvalidValue ? "invalid argument" : "error of the simulated device";
}

// For the tests: which device there is, and, unless null, in which order threads run. Returns 0, or 1 for unknown
// names.
__attribute__((visibility("default"))) int tokenprune_simt_configure(const char* device, const char* order,
                                                                     unsigned seed) {
  const auto found = kDevices.find(device);
  if (found == kDevices.end()) return 1;
  present = &found->second;
  try {
    if (order) simt::set_order(order, seed);
  } catch (const std::runtime_error&) {
    return 1;
  }
  return 0;
}
}
