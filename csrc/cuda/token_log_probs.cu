// token_log_probs: one CTA a row, one read; backward: one read and one write.
#include "cuda/common.cuh"
#include "cuda/launch.cuh"

namespace regrpo::cuda {

namespace {

constexpr int64_t kIgnore = -100;
constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // 16-byte loads of a thread before the first is used

template <typename T, bool CAP>
__global__ void __launch_bounds__(kThreads, 5)
    token_log_probs_fwd_kernel(const TokenLogProbsArgs args, const RowScale scale) {
  const int64_t r = blockIdx.x;
  const int64_t label = args.labels[r];
  if (label == kIgnore) {
    if (threadIdx.x == 0) {
      args.log_probs[r] = args.lse[r] = 0.0f;
      if (args.entropy) args.entropy[r] = 0.0f;
    }
    return;
  }
  const T* row = row_at<T>(args.logits, r);
  const RowLayout<T> layout(row, args.vocab);
  const uint4* packets = reinterpret_cast<const uint4*>(row + layout.head);
  RowSums sums;
  for (int p = threadIdx.x; p < layout.packets; p += kInFlight * kThreads) {
    uint4 in[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (p + k * kThreads < layout.packets) in[k] = packets[p + k * kThreads];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (p + k * kThreads < layout.packets) add_packet<T, CAP>(sums, in[k], scale);
  }
  if (threadIdx.x < layout.edges) add_edge<T, CAP>(sums, row[layout.edge(threadIdx.x)], scale);

  __shared__ RowSums parts[kThreads / kLanes];
  sums = merge_block<kThreads>(sums, parts, scale);
  if (threadIdx.x == 0) {
    const RowValues v = row_values(sums, capped<CAP>(to_float(row[label]), scale), scale);
    args.log_probs[r] = v.log_prob;
    args.lse[r] = v.lse;
    if (args.entropy) args.entropy[r] = v.entropy;
  }
}

template <typename T, bool CAP, bool ENTROPY>
__device__ __forceinline__ void write_gradient(const T* row, T* out, int64_t vocab, int64_t label,
                                               const RowGradient& gradient, const RowScale& scale) {
  const RowLayout<T> layout(row, vocab);
  const GradientWriter<T, CAP, ENTROPY> writer(gradient, scale, layout, label, to_float(row[label]));
  if (!same_alignment(row, out)) return writer.elements(row, out, vocab, threadIdx.x, kThreads);
  const uint4* in_packets = reinterpret_cast<const uint4*>(row + layout.head);
  uint4* out_packets = reinterpret_cast<uint4*>(out + layout.head);
  for (int p = threadIdx.x; p < layout.packets; p += kInFlight * kThreads) {
    uint4 in[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (p + k * kThreads < layout.packets) in[k] = in_packets[p + k * kThreads];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int q = p + k * kThreads;
      if (q < layout.packets) out_packets[q] = writer.packet(in[k], q);
    }
  }
  if (threadIdx.x < layout.edges) {
    const int64_t i = layout.edge(threadIdx.x);
    writer.element(row[i], i, out[i]);
  }
}

template <typename T, bool CAP>
__global__ void __launch_bounds__(kThreads, 4)
    token_log_probs_bwd_kernel(const TokenLogProbsArgs args, const RowScale scale) {
  const int64_t r = blockIdx.x;
  const int64_t label = args.labels[r];
  T* out = row_at<T>(args.dlogits, r);
  float g = 0.0f, k = 0.0f;
  if (label != kIgnore) {
    g = args.dlog_probs[r] * scale.inv_temperature;
    if (args.dentropy) k = -args.dentropy[r] * scale.inv_temperature;
  }
  if (g == 0.0f && k == 0.0f) return zero_row(out, args.vocab, threadIdx.x, kThreads);
  const T* row = row_at<T>(args.logits, r);
  // p = exp((z - lse * temperature) / temperature): lse takes the place of the maximum, and the sum is 1
  RowGradient gradient{static_cast<float>(args.lse[r] * args.temperature), 0.0f, -g, g};
  if (k == 0.0f) {
    write_gradient<T, CAP, false>(row, out, args.vocab, label, gradient, scale);
  } else {
    gradient.a = k * scale.inv_temperature;
    gradient.b += k * args.entropy[r];
    write_gradient<T, CAP, true>(row, out, args.vocab, label, gradient, scale);
  }
}

struct Forward {
  template <typename T, bool CAP>
  static constexpr auto kernel = &token_log_probs_fwd_kernel<T, CAP>;
};
struct Backward {
  template <typename T, bool CAP>
  static constexpr auto kernel = &token_log_probs_bwd_kernel<T, CAP>;
};

template <typename Pass, typename T>
int launch_rows(const TokenLogProbsArgs& args, void* stream) {
  const Shape shape{args.rows, kThreads};
  const RowScale scale = row_scale(args.temperature, args.softcap);
  return args.softcap > 0.0 ? launch(Pass::template kernel<T, true>, shape, stream, args, scale)
                            : launch(Pass::template kernel<T, false>, shape, stream, args, scale);
}

template <typename Pass>
int launch_dtype(const TokenLogProbsArgs& args, void* stream) {
  if (args.rows == 0) return kOk;
  switch (args.dtype) {
    case kFloat32: return launch_rows<Pass, float>(args, stream);
    case kBFloat16: return launch_rows<Pass, __nv_bfloat16>(args, stream);
    case kFloat16: return launch_rows<Pass, __half>(args, stream);
    default: return kBadDtype;
  }
}

}  // namespace

int token_log_probs(const TokenLogProbsArgs& args, void* stream) { return launch_dtype<Forward>(args, stream); }

int token_log_probs_backward(const TokenLogProbsArgs& args, void* stream) {
  return launch_dtype<Backward>(args, stream);
}

}  // namespace regrpo::cuda
