// Row addressing, element types, 16-byte access and block reductions in a fixed order, shared by the row kernels.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ops.h"

namespace regrpo::cuda {

constexpr int kThreads = 512;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kFloor = -1e30f;  // for d: keeps 0 * -inf out of the entropy

template <typename T>
__device__ __forceinline__ T* row_at(const Rows& rows, int64_t r) {
  return static_cast<T*>(rows.data) + (r / rows.inner) * rows.stride_outer + (r % rows.inner) * rows.stride_inner;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void from_float(float x, float& out) { out = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_float(float x, __half& out) { out = __float2half_rn(x); }

// 16 bytes of elements, moved as one word.
template <typename T>
union Packet {
  static constexpr int width = 16 / sizeof(T);
  uint4 word;
  T element[width];
  __device__ Packet() {}
};

// Calls each(index, value) for all elements of a row: 16-byte loads between an unaligned head and tail.
template <typename T, typename Each>
__device__ __forceinline__ void for_each_element(const T* row, int64_t vocab, const Each& each) {
  constexpr int W = Packet<T>::width;
  const int64_t head_room = int64_t((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
  const int64_t head = head_room < vocab ? head_room : vocab;
  const int64_t packets = (vocab - head) / W;
  for (int64_t i = threadIdx.x; i < head; i += kThreads) each(i, to_float(row[i]));
  for (int64_t p = threadIdx.x; p < packets; p += kThreads) {
    Packet<T> packet;
    packet.word = reinterpret_cast<const uint4*>(row + head)[p];
#pragma unroll
    for (int k = 0; k < W; ++k) each(head + p * W + k, to_float(packet.element[k]));
  }
  for (int64_t i = head + packets * W + threadIdx.x; i < vocab; i += kThreads) each(i, to_float(row[i]));
}

// out[i] = map(i, row[i]), packets in reverse order so that the second pass starts with what is still in L2. The two
// rows must be equally aligned for 16-byte access; otherwise elements go one by one.
template <typename T, typename Map>
__device__ __forceinline__ void map_row(const T* row, T* out, int64_t vocab, const Map& map) {
  constexpr int W = Packet<T>::width;
  const bool together = reinterpret_cast<uintptr_t>(row) % 16 == reinterpret_cast<uintptr_t>(out) % 16;
  const int64_t head_room = int64_t((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
  const int64_t head = together && head_room < vocab ? head_room : vocab;
  const int64_t packets = (vocab - head) / W;
  for (int64_t i = head + packets * W + threadIdx.x; i < vocab; i += kThreads) from_float(map(i, to_float(row[i])), out[i]);
  for (int64_t p = packets - 1 - threadIdx.x; p >= 0; p -= kThreads) {
    Packet<T> in, result;
    in.word = reinterpret_cast<const uint4*>(row + head)[p];
#pragma unroll
    for (int k = 0; k < W; ++k) from_float(map(head + p * W + k, to_float(in.element[k])), result.element[k]);
    reinterpret_cast<uint4*>(out + head)[p] = result.word;
  }
  for (int64_t i = threadIdx.x; i < head; i += kThreads) from_float(map(i, to_float(row[i])), out[i]);
}

template <typename T>
__device__ __forceinline__ void zero_row(T* out, int64_t vocab) {
  for (int64_t i = threadIdx.x; i < vocab; i += kThreads) from_float(0.0f, out[i]);
}

// z = c tanh(x / c); no cap where c is 0. Exact tanhf: the fast one is not accurate enough for a log-prob.
__device__ __forceinline__ float cap(float x, float softcap) { return softcap > 0.0f ? softcap * tanhf(x / softcap) : x; }

struct RowSums {
  float maximum, sum, moment;  // sum of e, sum of e * d, with d = z - maximum and e = exp(d / temperature)
};

__device__ __forceinline__ void move_reference(RowSums& r, float maximum, float scale) {
  if (maximum == r.maximum) return;
  const float d = r.maximum - maximum, shrink = exp2f(d * scale);
  r.moment = r.sum > 0.0f ? shrink * (r.moment + d * r.sum) : 0.0f;
  r.sum *= shrink;
  r.maximum = maximum;
}

__device__ __forceinline__ RowSums merge(RowSums x, RowSums y, float scale) {
  const float maximum = fmaxf(x.maximum, y.maximum);
  move_reference(x, maximum, scale);
  move_reference(y, maximum, scale);
  return {maximum, x.sum + y.sum, x.moment + y.moment};
}

// First pass over a row; every thread returns the whole row's sums.
template <typename T>
__device__ RowSums row_sums(const T* row, int64_t vocab, float inv_temperature, float softcap) {
  const float scale = inv_temperature * kLog2e;
  RowSums r{-INFINITY, 0.0f, 0.0f};
  for_each_element(row, vocab, [&](int64_t, float x) {
    const float z = cap(x, softcap);
    if (z > r.maximum) move_reference(r, z, scale);
    if (z == -INFINITY) return;
    const float d = z - r.maximum, e = exp2f(d * scale);  // NaN goes through
    r.sum += e;
    r.moment += e * d;
  });
  __shared__ RowSums partial[kThreads / 32];
  __shared__ RowSums total;
  for (int offset = 16; offset > 0; offset /= 2) {
    const RowSums other{__shfl_xor_sync(~0u, r.maximum, offset), __shfl_xor_sync(~0u, r.sum, offset),
                        __shfl_xor_sync(~0u, r.moment, offset)};
    // the lower lane's operand first, so that both lanes get the same bits
    r = threadIdx.x & offset ? merge(other, r, scale) : merge(r, other, scale);
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = r;
  __syncthreads();
  if (threadIdx.x == 0) {
    r = partial[0];
    for (int warp = 1; warp < kThreads / 32; ++warp) r = merge(r, partial[warp], scale);
    total = r;
  }
  __syncthreads();
  return total;
}

struct RowValues {
  float log_prob, lse, log_sum, entropy;
};
__device__ __forceinline__ RowValues row_values(const RowSums& r, float z_label, float inv_temperature) {
  RowValues v;
  v.log_sum = logf(r.sum);
  v.log_prob = fminf((z_label - r.maximum) * inv_temperature - v.log_sum, 0.0f);
  v.lse = r.maximum * inv_temperature + v.log_sum;
  v.entropy = fmaxf(v.log_sum - inv_temperature * r.moment / r.sum, 0.0f);
  return v;
}

// Second pass: out = e * (b + a d), plus at_label for the label, with d = z - reference.
template <typename T>
__device__ void row_gradient(const T* row, T* out, int64_t vocab, int64_t label, float inv_temperature, float softcap,
                             float reference, float a, float b, float at_label) {
  const float scale = inv_temperature * kLog2e;
  map_row(row, out, vocab, [&](int64_t i, float x) {
    const float z = cap(x, softcap);
    const float d = z == -INFINITY ? kFloor : z - reference;
    float v = exp2f(d * scale) * (b + a * d);
    if (i == label) v += at_label;
    if (softcap > 0.0f) v *= 1.0f - (z / softcap) * (z / softcap);
    return v;
  });
}

}  // namespace regrpo::cuda

// Launches KERNEL<T> with one CTA a row, for the element type of a dtype code; returns the CUDA error.
#define REGRPO_LAUNCH_ROWS(KERNEL, args, stream)                                                                     \
  {                                                                                                                  \
    if ((args).rows == 0) return kOk;                                                                                \
    const auto grid = static_cast<unsigned>((args).rows);                                                            \
    const auto on = static_cast<cudaStream_t>(stream);                                                               \
    switch ((args).dtype) {                                                                                          \
      case kFloat32: KERNEL<float><<<grid, kThreads, 0, on>>>(args); break;                                          \
      case kBFloat16: KERNEL<__nv_bfloat16><<<grid, kThreads, 0, on>>>(args); break;                                 \
      case kFloat16: KERNEL<__half><<<grid, kThreads, 0, on>>>(args); break;                                         \
      default: return kBadDtype;                                                                                     \
    }                                                                                                                \
    return static_cast<int>(cudaGetLastError());                                                                     \
  }
