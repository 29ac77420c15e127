// Kernels with one mistake each, which the emulator must report.
#include "cuda/ptx.cuh"

namespace {
using namespace regrpo::cuda;

__global__ void unequal_barrier(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1.0f;
}
__global__ void past_shared_memory(float* out) {
  reinterpret_cast<float*>(dynamic_shared_memory())[256 + threadIdx.x] = 0.0f;
  out[threadIdx.x] = 1.0f;
}
// Writes what it has read before any thread wrote it: NaN bytes.
__global__ void uninitialised(float* out) {
  out[threadIdx.x] = reinterpret_cast<float*>(dynamic_shared_memory())[threadIdx.x];
}
__global__ void copy(float* out, const float* in, bool waits, int bytes) {
  auto* barrier = reinterpret_cast<TransactionBarrier*>(dynamic_shared_memory());
  float* to = reinterpret_cast<float*>(barrier + 2);
  if (threadIdx.x == 0) {
    init_barrier(barrier);
    expect_bytes(barrier, bytes);
    bulk_load(to, in, bytes, barrier);
  }
  __syncthreads();
  if (waits) wait_barrier(barrier, 0);
  out[threadIdx.x] = to[threadIdx.x];
}
}  // namespace

extern "C" int run_fault(const char* name, float* out, const float* in) {
  using emulator::Launch;
  using emulator::launch_kernel;
  const Launch launch{1, 64, 1, 1024};
  const std::string fault = name;
  if (fault == "unequal barrier") return launch_kernel(launch, unequal_barrier, out);
  if (fault == "past shared memory") return launch_kernel(launch, past_shared_memory, out);
  if (fault == "uninitialised") return launch_kernel(launch, uninitialised, out);
  if (fault == "no wait") return launch_kernel(launch, copy, out, in, false, 256);
  if (fault == "unaligned copy") return launch_kernel(launch, copy, out, in + 1, true, 240);
  if (fault == "none") return launch_kernel(launch, copy, out, in, true, 256);
  return -1;
}
