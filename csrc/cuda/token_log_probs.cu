// token_log_probs: one read of each row, by a thread-block cluster on compute capability 9.x and 10.x and by one CTA
// elsewhere; backward: one CTA a row, one read and one write.
#include "cuda/cluster.cuh"

namespace regrpo::cuda {

namespace {

constexpr int64_t kIgnore = -100;
constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // 16-byte loads of a thread before the first is used

__device__ __forceinline__ void write_values(const TokenLogProbsArgs& args, int64_t r, const RowSums& sums,
                                             const RowValues& v) {
  args.log_probs[r] = v.log_prob;
  args.lse[r] = v.lse;
  args.reference[r] = sums.maximum;
  args.sum[r] = sums.sum;
  if (args.entropy) args.entropy[r] = v.entropy;
}

template <typename T, bool CAP>
__device__ __forceinline__ void cluster_forward(const TokenLogProbsArgs& args, const RowScale& scale) {
  const bool writer = cluster_rank() == 0 && threadIdx.x == 0;
  const int64_t r = blockIdx.x / cluster_size();
  const int64_t label = args.labels[r];
  if (label == kIgnore) {
    if (writer) write_values(args, r, RowSums{}, RowValues{});
    return;
  }
  const T* row = row_at<T>(args.logits, r);
  RowCluster<T> cluster(row, args.vocab);
  const float x_label = writer ? to_float(row[label]) : 0.0f;
  const RowSums sums = cluster.template sums<CAP>(scale);
  if (writer) write_values(args, r, sums, row_values(sums, capped<CAP>(x_label, scale), scale));
}

template <typename T, bool CAP>
__global__ void __launch_bounds__(kClusterThreads, 3)
    token_log_probs_cluster_kernel(const __grid_constant__ TokenLogProbsArgs args,
                                   const __grid_constant__ RowScale scale) {
  if constexpr (kHasClusters) cluster_forward<T, CAP>(args, scale);
}

template <typename T, bool CAP>
__global__ void __launch_bounds__(kThreads, 5)
    token_log_probs_fwd_kernel(const TokenLogProbsArgs args, const RowScale scale) {
  const int64_t r = blockIdx.x;
  const int64_t label = args.labels[r];
  if (label == kIgnore) {
    if (threadIdx.x == 0) write_values(args, r, RowSums{}, RowValues{});
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
  if (threadIdx.x == 0) write_values(args, r, sums, row_values(sums, capped<CAP>(to_float(row[label]), scale), scale));
}

template <typename T, bool CAP, bool ENTROPY>
__device__ __forceinline__ void write_gradient(const T* row, T* out, int64_t vocab, int64_t label,
                                               const RowGradient& gradient, const RowScale& scale) {
  const RowLayout<T> layout(row, vocab);
  // in place, the label's logit may be gone already, but not for the one thread that uses it: that one replaces it
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
  float g = 0.0f, k = 0.0f, entropy = 0.0f;
  if (label != kIgnore) {
    g = args.dlog_probs[r] * scale.inv_temperature;
    if (args.dentropy) {
      k = -args.dentropy[r] * scale.inv_temperature;
      entropy = args.entropy[r];
    }
  }
  if (g == 0.0f && k == 0.0f) return zero_row(out, args.vocab, threadIdx.x, kThreads);
  const T* row = row_at<T>(args.logits, r);
  const RowGradient gradient = row_gradient(args.reference[r], args.sum[r], logf(args.sum[r]), entropy, g, k);
  if (k == 0.0f) {
    write_gradient<T, CAP, false>(row, out, args.vocab, label, gradient, scale);
  } else {
    write_gradient<T, CAP, true>(row, out, args.vocab, label, gradient, scale);
  }
}

struct Forward {
  template <typename T, bool CAP>
  static int launch_rows(const TokenLogProbsArgs& args, const RowScale& scale, void* stream) {
    static LargeKernel cluster_kernel;
    const Device device = current_device();
    int status = device.error;
    if (status || launch_clusters(cluster_kernel, token_log_probs_cluster_kernel<T, CAP>, device, args.rows,
                                  args.vocab * int64_t(sizeof(T)), stream, &status, args, scale))
      return status;
    return launch(token_log_probs_fwd_kernel<T, CAP>, Shape{args.rows, kThreads}, stream, args, scale);
  }
};
struct Backward {
  template <typename T, bool CAP>
  static int launch_rows(const TokenLogProbsArgs& args, const RowScale& scale, void* stream) {
    return launch(token_log_probs_bwd_kernel<T, CAP>, Shape{args.rows, kThreads}, stream, args, scale);
  }
};

template <typename Pass, typename T>
int launch_rows(const TokenLogProbsArgs& args, void* stream) {
  const RowScale scale = row_scale(args.temperature, args.softcap);
  return args.softcap > 0.0 ? Pass::template launch_rows<T, true>(args, scale, stream)
                            : Pass::template launch_rows<T, false>(args, scale, stream);
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
