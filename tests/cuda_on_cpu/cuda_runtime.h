// Stands in for the CUDA runtime's header: what the kernels and launchers of csrc/cuda use of it.
#pragma once
#include <math.h>

#include <algorithm>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

using std::max;
using std::min;

// ---- device ----------------------------------------------------------------------------------------------
inline void __syncthreads() { emulator::syncthreads_or(0); }
inline int __syncthreads_or(int predicate) { return emulator::syncthreads_or(predicate); }
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) { return emulator::shuffle_xor(mask, value, lane_mask); }
inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }

// ---- host ------------------------------------------------------------------------------------------------
using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor, cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor, cudaDevAttrReservedSharedMemoryPerBlock
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttributeValue { struct { unsigned x, y, z; } clusterDim; };
struct cudaLaunchAttribute { cudaLaunchAttributeID id; cudaLaunchAttributeValue val; };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
struct cudaFuncAttributes { int ptxVersion; size_t sharedSizeBytes; };

namespace emulator {
inline std::map<std::pair<const void*, int>, std::map<int, int>> function_attributes;  // by kernel and device
inline cudaError_t last_error = cudaSuccess;

// What the driver checks; __shared__ variables are counted as nothing.
template <typename... P, typename... A>
cudaError_t launch_kernel(const Launch& launch, void (*kernel)(P...), A... args) {
  const Device& device = devices[current_device];
  auto& attributes = function_attributes[{reinterpret_cast<const void*>(kernel), current_device}];
  const size_t allowed = std::max(48 << 10, attributes[cudaFuncAttributeMaxDynamicSharedMemorySize]);
  const unsigned ranks = attributes[cudaFuncAttributeNonPortableClusterSizeAllowed] ? 16 : 8;
  if (launch.shared_bytes > std::min<size_t>(allowed, device.shared_per_block) || launch.cluster > ranks ||
      (launch.cluster > 1 && device.capability < 90))
    return last_error = cudaErrorInvalidConfiguration;
  return last_error = cudaError_t(run(launch, [=] { kernel(args...); }));
}

// kernel<<<grid, threads, shared_bytes, stream>>>(args...) is rewritten to configure(kernel, grid, ...)(args...)
template <typename... P>
auto configure(void (*kernel)(P...), unsigned grid, unsigned threads, size_t shared_bytes = 0, void* = nullptr) {
  return [=](auto... args) { launch_kernel({grid, threads, 1, shared_bytes}, kernel, args...); };
}
}  // namespace emulator

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = emulator::current_device, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const emulator::Device& d = emulator::devices[device];
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = d.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = d.capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = d.shared_per_block; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = d.shared_per_multiprocessor; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
  }
  return cudaSuccess;
}
template <typename... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(P...)) {
  *attributes = {emulator::devices[emulator::current_device].capability, 0};
  return cudaSuccess;
}
template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  const void* key = reinterpret_cast<const void*>(kernel);
  emulator::function_attributes[{key, emulator::current_device}][attribute] = value;
  return cudaSuccess;
}
template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... args) {
  const unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  return emulator::launch_kernel({config->gridDim.x, config->blockDim.x, cluster, config->dynamicSmemBytes}, kernel,
                                 args...);
}
