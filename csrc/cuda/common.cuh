// One vocabulary row on the GPU, shared by the row kernels: its 16-byte packets, running sums, values and gradient.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/ptx.cuh"
#include "ops.h"

namespace regrpo::cuda {

constexpr int kLanes = 32;
constexpr float kFloor = -1e4f;               // for y, where 2^y is 0: keeps 0 * -inf out of the entropy
constexpr float kLowest = -3.402823466e+38f;  // a maximum that keeps -inf - -inf out as well
constexpr float kLn2 = 0.693147181f;

// ---- elements --------------------------------------------------------------------------------------------
template <typename T>
__device__ __forceinline__ T* row_at(const Rows& rows, int64_t r) {
  const int64_t outer = r < rows.inner ? 0 : r / rows.inner;  // packed rows need no division
  return static_cast<T*>(rows.data) + outer * rows.stride_outer + (r - outer * rows.inner) * rows.stride_inner;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void from_float(float x, float& out) { out = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_float(float x, __half& out) { out = __float2half_rn(x); }

// 16 bytes of elements, moved as one word. Pairs go by the type's own conversion of two at once.
template <typename T>
constexpr int kWidth = 16 / sizeof(T);

__device__ __forceinline__ void unpack_word(unsigned word, float* x, float) { x[0] = __uint_as_float(word); }
__device__ __forceinline__ void unpack_word(unsigned word, float* x, __nv_bfloat16) {
  x[0] = __uint_as_float(word << 16);
  x[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack_word(unsigned word, float* x, __half) { unpack_half(word, x[0], x[1]); }
__device__ __forceinline__ unsigned pack_word(const float* x, float) { return __float_as_uint(x[0]); }
__device__ __forceinline__ unsigned pack_word(const float* x, __nv_bfloat16) { return pack_bf16(x[0], x[1]); }
__device__ __forceinline__ unsigned pack_word(const float* x, __half) { return pack_half(x[0], x[1]); }

template <typename T>
__device__ __forceinline__ void unpack(const uint4& packet, float (&x)[kWidth<T>]) {
  constexpr int n = kWidth<T> / 4;
  unpack_word(packet.x, x, T{});
  unpack_word(packet.y, x + n, T{});
  unpack_word(packet.z, x + 2 * n, T{});
  unpack_word(packet.w, x + 3 * n, T{});
}
template <typename T>
__device__ __forceinline__ uint4 pack(const float (&x)[kWidth<T>]) {
  constexpr int n = kWidth<T> / 4;
  uint4 packet;
  packet.x = pack_word(x, T{});
  packet.y = pack_word(x + n, T{});
  packet.z = pack_word(x + 2 * n, T{});
  packet.w = pack_word(x + 3 * n, T{});
  return packet;
}

// ---- a row's layout --------------------------------------------------------------------------------------
// Packets lie between a head, up to the first 16-byte boundary, and a tail. Head and tail together are the edges: fewer
// than two packets, so one element for each of the first threads.
template <typename T>
struct RowLayout {
  int head, edges, packets;

  __device__ RowLayout(const T* row, int64_t vocab) {
    const int room = static_cast<int>((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
    head = room < vocab ? room : static_cast<int>(vocab);
    packets = static_cast<int>((vocab - head) / kWidth<T>);
    edges = static_cast<int>(vocab - int64_t(packets) * kWidth<T>);
  }
  __device__ int64_t edge(int i) const { return i < head ? i : i + int64_t(packets) * kWidth<T>; }
  __device__ int64_t first_of(int packet) const { return head + int64_t(packet) * kWidth<T>; }
};

// Whether packets of `row` are packets of `out`.
__device__ __forceinline__ bool same_alignment(const void* row, const void* out) {
  return reinterpret_cast<uintptr_t>(row) % 16 == reinterpret_cast<uintptr_t>(out) % 16;
}

// This block's share of a row of zeros, from thread `thread` of `threads`.
template <typename T>
__device__ __forceinline__ void zero_row(T* out, int64_t vocab, unsigned thread, unsigned threads) {
  const RowLayout<T> layout(out, vocab);
  if (thread < layout.edges) from_float(0.0f, out[layout.edge(thread)]);
  uint4* packets = reinterpret_cast<uint4*>(out + layout.head);
  for (unsigned p = thread; p < layout.packets; p += threads) packets[p] = uint4{0, 0, 0, 0};
}

// ---- running sums ----------------------------------------------------------------------------------------
// From the logit as stored to y = (z - reference) / temperature / ln 2, e = 2^y. Computed on the host: 1 / T in fp64.
struct RowScale {
  float inv_temperature, log2e_temperature;  // 1 / T, log2(e) / T
  float softcap, inv_softcap;                // 0: none
};
inline RowScale row_scale(double temperature, double softcap) {
  return {static_cast<float>(1.0 / temperature), static_cast<float>(1.4426950408889634 / temperature),
          static_cast<float>(softcap), softcap > 0.0 ? static_cast<float>(1.0 / softcap) : 0.0f};
}

// z = c tanh(x / c). Exact tanhf: the fast one is not accurate enough for a log-prob.
template <bool CAP>
__device__ __forceinline__ float capped(float x, const RowScale& s) {
  return CAP ? s.softcap * tanhf(x * s.inv_softcap) : x;
}

struct RowSums {
  float maximum = kLowest, sum = 0.0f, moment = 0.0f;  // sum of e and of e * y, relative to the maximum
};

__device__ __forceinline__ void move_reference(RowSums& r, float maximum, const RowScale& s) {
  const float y = max_nan((r.maximum - maximum) * s.log2e_temperature, kFloor), shrink = exp2_approx(y);
  r.moment = shrink * (r.moment + y * r.sum);
  r.sum *= shrink;
  r.maximum = maximum;
}

// Adds elements: their maximum first, then one exponential each. The maximum ignores NaN, which the sums carry.
template <bool CAP, int N>
__device__ __forceinline__ void add_elements(RowSums& r, float (&x)[N], const RowScale& s) {
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] = capped<CAP>(x[k], s);
  float top = x[0];
#pragma unroll
  for (int k = 1; k < N; ++k) top = fmaxf(top, x[k]);
  if (top > r.maximum) move_reference(r, top, s);
  float sum = 0.0f, moment = 0.0f;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float y = max_nan((x[k] - r.maximum) * s.log2e_temperature, kFloor), e = exp2_approx(y);
    sum += e;
    moment += e * y;
  }
  r.sum += sum;
  r.moment += moment;
}
template <typename T, bool CAP>
__device__ __forceinline__ void add_packet(RowSums& r, const uint4& packet, const RowScale& s) {
  float x[kWidth<T>];
  unpack<T>(packet, x);
  add_elements<CAP>(r, x, s);
}
template <typename T, bool CAP>
__device__ __forceinline__ void add_edge(RowSums& r, T element, const RowScale& s) {
  float x[1] = {to_float(element)};
  add_elements<CAP>(r, x, s);
}

// The sums of several parts, in their order.
__device__ __forceinline__ RowSums merge(const RowSums* parts, int count, const RowScale& s) {
  RowSums all;
#pragma unroll 2  // all parts at once would take more registers than anything else
  for (int i = 0; i < count; ++i) all.maximum = fmaxf(all.maximum, parts[i].maximum);
#pragma unroll 2
  for (int i = 0; i < count; ++i) {
    RowSums part = parts[i];
    move_reference(part, all.maximum, s);
    all.sum += part.sum;
    all.moment += part.moment;
  }
  return all;
}

// The sums of a warp, in every lane, with the same bits: x + y and y + x are the same.
__device__ __forceinline__ RowSums merge_warp(RowSums r, const RowScale& s) {
  float maximum = r.maximum;
  for (int lane = kLanes / 2; lane > 0; lane /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, lane));
  move_reference(r, maximum, s);
  for (int lane = kLanes / 2; lane > 0; lane /= 2) {
    r.sum += __shfl_xor_sync(~0u, r.sum, lane);
    r.moment += __shfl_xor_sync(~0u, r.moment, lane);
  }
  return r;
}

// The sums of a block, in every thread; `parts` is shared memory with room for one a warp.
template <int THREADS>
__device__ __forceinline__ RowSums merge_block(const RowSums& own, RowSums* parts, const RowScale& s) {
  const RowSums warp = merge_warp(own, s);
  if (threadIdx.x % kLanes == 0) parts[threadIdx.x / kLanes] = warp;
  __syncthreads();
  return merge(parts, THREADS / kLanes, s);
}

// ---- values and gradient ---------------------------------------------------------------------------------
struct RowValues {
  float log_prob, lse, log_sum, entropy;
};
// NaN passes the comparisons.
__device__ __forceinline__ RowValues row_values(const RowSums& r, float z_label, const RowScale& s) {
  RowValues v;
  v.log_sum = logf(r.sum);
  v.log_prob = (z_label - r.maximum) * s.inv_temperature - v.log_sum;
  if (v.log_prob > 0.0f) v.log_prob = 0.0f;  // rounding of the sum must not make a probability exceed 1
  v.lse = r.maximum * s.inv_temperature + v.log_sum;
  v.entropy = v.log_sum - kLn2 * r.moment / r.sum;
  if (v.entropy < 0.0f) v.entropy = 0.0f;
  return v;
}

// The gradient of a row: e * (b + a * y), and `at_label` besides for the label, times the softcap's slope.
struct RowGradient {
  float reference, a, b, at_label;
};
// Of g log_prob - k entropy, where `sum` belongs to `reference`.
__device__ __forceinline__ RowGradient row_gradient(float reference, float sum, float log_sum, float entropy, float g,
                                                    float k) {
  return {reference, k * kLn2 / sum, (k * (entropy - log_sum) - g) / sum, g};
}

// Writes it. The label's value is summed in fp32 and rounded once, with all others.
template <typename T, bool CAP, bool ENTROPY>
class GradientWriter {
 public:
  __device__ GradientWriter(const RowGradient& gradient, const RowScale& scale, const RowLayout<T>& layout,
                            int64_t label, float x_label)
      : g_(gradient), s_(scale), label_(label), label_packet_(-1), label_slot_(0) {
    label_value_ = value(x_label, g_.at_label);
    if (label >= layout.head) {
      label_packet_ = static_cast<int>((label - layout.head) / kWidth<T>);  // past the last one if it is in the tail
      label_slot_ = static_cast<int>((label - layout.head) % kWidth<T>);
    }
  }
  __device__ __forceinline__ uint4 packet(const uint4& in, int p) const {
    float x[kWidth<T>];
    unpack<T>(in, x);
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) x[k] = value(x[k]);
    if (p == label_packet_) {
#pragma unroll
      for (int k = 0; k < kWidth<T>; ++k) x[k] = k == label_slot_ ? label_value_ : x[k];
    }
    return pack<T>(x);
  }
  __device__ __forceinline__ void element(T in, int64_t i, T& out) const {
    from_float(i == label_ ? label_value_ : value(to_float(in)), out);
  }
  // This thread's share of a row whose packets are not packets of `out`.
  __device__ void elements(const T* row, T* out, int64_t vocab, unsigned thread, unsigned threads) const {
    for (int64_t i = thread; i < vocab; i += threads) element(row[i], i, out[i]);
  }

 private:
  __device__ __forceinline__ float value(float x, float more = 0.0f) const {
    const float z = capped<CAP>(x, s_);
    float y = (z - g_.reference) * s_.log2e_temperature;
    if (ENTROPY) y = max_nan(y, kFloor);
    float v = exp2_approx(y) * (ENTROPY ? g_.b + g_.a * y : g_.b) + more;
    if (CAP) {
      const float t = z * s_.inv_softcap;
      v *= 1.0f - t * t;
    }
    return v;
  }
  RowGradient g_;
  RowScale s_;
  int64_t label_;
  int label_packet_, label_slot_;
  float label_value_;
};

}  // namespace regrpo::cuda
