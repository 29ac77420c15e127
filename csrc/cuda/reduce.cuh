// Reductions of one double a thread over a block, in an order that does not change from run to run.
#pragma once
#include <cuda_runtime.h>

namespace regrpo::cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;

struct Sum {
  __device__ double operator()(double a, double b) const { return a + b; }
};
struct Min {
  __device__ double operator()(double a, double b) const { return fmin(a, b); }
};
struct Max {
  __device__ double operator()(double a, double b) const { return fmax(a, b); }
};

// Every thread gets the result. The tree over lanes, then over warps, is the same in every run.
template <typename Op>
__device__ double block_reduce(double value, double identity, Op op) {
  __shared__ double partial[kMaxThreads / kWarp];
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value = op(value, __shfl_xor_sync(0xffffffffu, value, lane));
  __syncthreads();  // the previous reduction has been read
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  double result = identity;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) result = op(result, partial[warp]);
  return result;
}

}  // namespace regrpo::cuda
