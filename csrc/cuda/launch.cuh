// Launches on the caller's stream and the current device. Nothing synchronises, and what a device or a kernel on it can
// do is asked for once, so that launches can be captured in a CUDA graph.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <utility>

namespace regrpo::cuda {

constexpr int kMaxDevices = 64;

struct Device {
  int index, major, minor;
  int shared_per_block, shared_per_multiprocessor, reserved_per_block;  // bytes
  cudaError_t error;

  bool has_clusters() const { return major == 9 || major == 10; }  // see kHasClusters
  // Shared memory that a block may ask for when `blocks` of them are to share a multiprocessor.
  int shared_for(int blocks) const {
    const int share = shared_per_multiprocessor / blocks - reserved_per_block;
    return share < shared_per_block ? share : shared_per_block;
  }
};

inline Device ask_device(int index) {
  Device d{};
  d.index = index;
  for (const auto& [value, attribute] : {
           std::pair{&d.major, cudaDevAttrComputeCapabilityMajor},
           std::pair{&d.minor, cudaDevAttrComputeCapabilityMinor},
           std::pair{&d.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
           std::pair{&d.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
           std::pair{&d.reserved_per_block, cudaDevAttrReservedSharedMemoryPerBlock},
       })
    if (!d.error) d.error = cudaDeviceGetAttribute(value, attribute, index);
  return d;
}

inline Device current_device() {
  static std::once_flag once[kMaxDevices];
  static Device known[kMaxDevices];
  Device none{};
  int index = 0;
  none.error = cudaGetDevice(&index);
  if (none.error) return none;
  if (index >= kMaxDevices) return ask_device(index);
  std::call_once(once[index], [index] { known[index] = ask_device(index); });
  return known[index];
}

// A kernel that may use all of a block's shared memory, and clusters of 16 where `clusters` is set.
class LargeKernel {
 public:
  struct State {
    cudaError_t error;
    int ptx_version;  // of the code that this device runs: 90 and up has clusters
  };
  template <typename... P>
  State on(const Device& device, void (*kernel)(P...), bool clusters) {
    if (device.index >= kMaxDevices) return prepare(device, kernel, clusters);
    std::call_once(once_[device.index], [&] { states_[device.index] = prepare(device, kernel, clusters); });
    return states_[device.index];
  }

 private:
  template <typename... P>
  static State prepare(const Device& device, void (*kernel)(P...), bool clusters) {
    cudaFuncAttributes attributes;
    State state{cudaFuncGetAttributes(&attributes, kernel), 0};
    const auto set = [&](cudaFuncAttribute attribute, int value) {
      if (!state.error) state.error = cudaFuncSetAttribute(kernel, attribute, value);
    };
    set(cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
    set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (clusters) set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (!state.error) state.ptx_version = attributes.ptxVersion;
    return state;
  }
  std::once_flag once_[kMaxDevices];
  State states_[kMaxDevices];
};

struct Shape {
  int64_t blocks;
  unsigned threads, cluster = 1;
  size_t shared_bytes = 0;
};

template <typename... P>
int launch(void (*kernel)(P...), const Shape& shape, void* stream, P... args) {
  if (shape.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {shape.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace regrpo::cuda
