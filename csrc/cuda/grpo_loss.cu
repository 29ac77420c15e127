// grpo_loss: a row's sums, the token's objective, then the row's gradient. Two kernels, chosen on the host:
//   cluster  (compute capability 9.x and 10.x) the CTAs of a cluster hold the row: one read, one write;
//   row      (all others, and rows too long for a cluster) one CTA a row keeps what fits in registers and shared
//            memory, and reads the rest again from L2.
#include "cuda/cluster.cuh"
#include "objective.h"

namespace regrpo::cuda {

namespace {

// Shared by the CTAs of a row: what the token's objective makes of the row's sums. `writer`: this thread stores them.
__device__ __forceinline__ RowGradient token_gradient(const GrpoLossArgs& args, int64_t r, const RowSums& sums,
                                                      float z_label, const RowScale& scale, bool writer) {
  const RowValues v = row_values(sums, z_label, scale);
  const float weight = args.weights[r];
  const TokenObjective token = token_objective(
      args.objective, v.log_prob, token_ratio(v.log_prob, args.old_log_probs ? args.old_log_probs + r : nullptr),
      args.ref_log_probs ? args.ref_log_probs + r : nullptr, args.advantages ? args.advantages[r] : 1.0f);
  if (writer) {
    float* stats = args.stats + r;
    stats[kStatLogProb * args.rows] = v.log_prob;
    stats[kStatLse * args.rows] = v.lse;
    stats[kStatEntropy * args.rows] = v.entropy;
    write_stats(args.objective, token, v.entropy, weight, stats, args.rows);
  }
  const float scaled = weight * scale.inv_temperature;
  const float g = scaled * token.dlog_prob, k = scaled * args.objective.entropy_coef;
  return row_gradient(sums.maximum, sums.sum, v.log_sum, v.entropy, g, k);
}

__device__ __forceinline__ void skip_stats(const GrpoLossArgs& args, int64_t r) {
  if (threadIdx.x < kGrpoStats) args.stats[threadIdx.x * args.rows + r] = 0.0f;
}

// ---- cluster ---------------------------------------------------------------------------------------------
template <typename T, bool CAP, bool ENTROPY>
__device__ __forceinline__ void write_slice(const RowCluster<T>& cluster, const T* row, T* out, int64_t vocab,
                                            int64_t label, float x_label, const RowGradient& gradient,
                                            const RowScale& scale) {
  const GradientWriter<T, CAP, ENTROPY> writer(gradient, scale, cluster.layout, label, x_label);
  if (!same_alignment(row, out)) {
    const unsigned thread = cluster.rank * kClusterThreads + threadIdx.x;
    return writer.elements(row, out, vocab, thread, cluster.ranks * kClusterThreads);
  }
  uint4* packets = reinterpret_cast<uint4*>(out + cluster.layout.head) + cluster.begin;
  for (int p = threadIdx.x; p < cluster.count; p += kClusterThreads)
    packets[p] = writer.packet(cluster.slice[p], cluster.begin + p);
  if (cluster.has_edge) {
    const int64_t i = cluster.layout.edge(threadIdx.x);
    writer.element(cluster.edge, i, out[i]);
  }
}

template <typename T, bool CAP>
__device__ __forceinline__ void sweep_cluster(const GrpoLossArgs& args, const RowScale& scale) {
  const unsigned rank = cluster_rank(), ranks = cluster_size();
  const unsigned thread = rank * kClusterThreads + threadIdx.x;
  const int64_t r = blockIdx.x / ranks;
  const bool trained = args.mask[r];
  T* out = args.dlogits.data ? row_at<T>(args.dlogits, r) : nullptr;
  if (!trained) {
    if (rank == 0) skip_stats(args, r);
    if (out) zero_row(out, args.vocab, thread, ranks * kClusterThreads);
    return;
  }
  const T* row = row_at<T>(args.logits, r);
  RowCluster<T> cluster(row, args.vocab);
  const int64_t label = args.labels[r];
  const float x_label = to_float(row[label]);  // before the gradient may replace it
  const RowSums sums = cluster.template sums<CAP>(scale);
  const RowGradient gradient = token_gradient(args, r, sums, capped<CAP>(x_label, scale), scale, thread == 0);
  if (!out) return;
  if (gradient.at_label == 0.0f && gradient.a == 0.0f) {
    zero_row(out, args.vocab, thread, ranks * kClusterThreads);
  } else if (gradient.a == 0.0f) {
    write_slice<T, CAP, false>(cluster, row, out, args.vocab, label, x_label, gradient, scale);
  } else {
    write_slice<T, CAP, true>(cluster, row, out, args.vocab, label, x_label, gradient, scale);
  }
}

template <typename T, bool CAP>
__global__ void __launch_bounds__(kClusterThreads, 3)
    grpo_loss_cluster_kernel(const __grid_constant__ GrpoLossArgs args, const __grid_constant__ RowScale scale) {
  if constexpr (kHasClusters) sweep_cluster<T, CAP>(args, scale);
}

// ---- row -------------------------------------------------------------------------------------------------
constexpr int kRowThreads = 512;
constexpr int kHeld = 4;      // packets of a thread that stay in registers
constexpr int kInFlight = 4;  // loads of a thread before the first is used

struct alignas(128) RowShared {
  RowSums warps[kRowThreads / kLanes];
};

// Round n of a row is its packets n * kRowThreads and up, one a thread. The last kHeld rounds stay in registers, the
// `kept` before them in shared memory, and the ones before those are read twice. A thread only ever sees its own.
template <typename T, bool CAP>
class RowRounds {
 public:
  __device__ RowRounds(const T* row, const RowLayout<T>& layout, int kept)
      : packets_(reinterpret_cast<const uint4*>(row + layout.head) + threadIdx.x),
        kept_(reinterpret_cast<uint4*>(dynamic_shared_memory() + sizeof(RowShared)) + threadIdx.x),
        count_(layout.packets - static_cast<int>(threadIdx.x)) {
    const int rounds = (layout.packets + kRowThreads - 1) / kRowThreads;
    near_ = max(rounds - kHeld, 0);
    far_ = max(near_ - kept, 0);
  }
  __device__ __forceinline__ RowSums sums(const RowScale& scale) {
    RowSums sums;
    for (int n = 0; n < near_; n += kInFlight) {
      uint4 in[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k)
        if (n + k < near_) in[k] = packets_[(n + k) * kRowThreads];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        if (n + k >= near_) break;
        if (n + k >= far_) kept_[(n + k - far_) * kRowThreads] = in[k];
        add_packet<T, CAP>(sums, in[k], scale);
      }
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
      if ((near_ + k) * kRowThreads < count_) held_[k] = packets_[(near_ + k) * kRowThreads];
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
      if ((near_ + k) * kRowThreads < count_) add_packet<T, CAP>(sums, held_[k], scale);
    return sums;
  }
  // In the opposite order, so that the second read starts with what is still in L2.
  template <typename Writer>
  __device__ __forceinline__ void write(const Writer& writer, uint4* out) {
    const int thread = static_cast<int>(threadIdx.x);
    out += thread;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int at = (near_ + k) * kRowThreads;
      if (at < count_) out[at] = writer.packet(held_[k], at + thread);
    }
    for (int n = near_; n > 0; n -= kInFlight) {
      uint4 in[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int m = n - 1 - k;
        if (m >= 0) in[k] = m >= far_ ? kept_[(m - far_) * kRowThreads] : packets_[m * kRowThreads];
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int at = (n - 1 - k) * kRowThreads;
        if (at >= 0) out[at] = writer.packet(in[k], at + thread);
      }
    }
  }

 private:
  const uint4* packets_;
  uint4* kept_;
  int count_, near_, far_;
  uint4 held_[kHeld];
};

template <typename T, bool CAP, bool ENTROPY>
__device__ __forceinline__ void write_row(RowRounds<T, CAP>& rounds, const T* row, T* out, int64_t vocab,
                                          const RowLayout<T>& layout, int64_t label, float x_label,
                                          const RowGradient& gradient, const RowScale& scale) {
  const GradientWriter<T, CAP, ENTROPY> writer(gradient, scale, layout, label, x_label);
  if (!same_alignment(row, out)) return writer.elements(row, out, vocab, threadIdx.x, kRowThreads);
  rounds.write(writer, reinterpret_cast<uint4*>(out + layout.head));
  if (threadIdx.x < layout.edges) {
    const int64_t i = layout.edge(threadIdx.x);
    writer.element(row[i], i, out[i]);
  }
}

template <typename T, bool CAP>
__global__ void __launch_bounds__(kRowThreads, 2)
    grpo_loss_row_kernel(const __grid_constant__ GrpoLossArgs args, const __grid_constant__ RowScale scale,
                         const int kept) {
  const int64_t r = blockIdx.x;
  const bool trained = args.mask[r];
  T* out = args.dlogits.data ? row_at<T>(args.dlogits, r) : nullptr;
  if (!trained) {
    skip_stats(args, r);
    if (out) zero_row(out, args.vocab, threadIdx.x, kRowThreads);
    return;
  }
  const T* row = row_at<T>(args.logits, r);
  const RowLayout<T> layout(row, args.vocab);
  const int64_t label = args.labels[r];
  const float x_label = to_float(row[label]);  // before the gradient may replace it

  auto& shared = *reinterpret_cast<RowShared*>(dynamic_shared_memory());
  RowRounds<T, CAP> rounds(row, layout, kept);
  RowSums sums = rounds.sums(scale);
  if (threadIdx.x < layout.edges) add_edge<T, CAP>(sums, row[layout.edge(threadIdx.x)], scale);
  sums = merge_block<kRowThreads>(sums, shared.warps, scale);

  const RowGradient gradient = token_gradient(args, r, sums, capped<CAP>(x_label, scale), scale, threadIdx.x == 0);
  if (!out) return;
  if (gradient.at_label == 0.0f && gradient.a == 0.0f) {
    zero_row(out, args.vocab, threadIdx.x, kRowThreads);
  } else if (gradient.a == 0.0f) {
    write_row<T, CAP, false>(rounds, row, out, args.vocab, layout, label, x_label, gradient, scale);
  } else {
    write_row<T, CAP, true>(rounds, row, out, args.vocab, layout, label, x_label, gradient, scale);
  }
}

// ---- host ------------------------------------------------------------------------------------------------
template <typename T, bool CAP>
int launch_rows(const GrpoLossArgs& args, void* stream) {
  static LargeKernel cluster_kernel, row_kernel;
  const Device device = current_device();
  if (device.error) return device.error;
  const RowScale scale = row_scale(args.temperature, args.softcap);
  const int64_t row_bytes = args.vocab * int64_t(sizeof(T));

  int status;
  if (launch_clusters(cluster_kernel, grpo_loss_cluster_kernel<T, CAP>, device, args.rows, row_bytes, stream, &status,
                      args, scale))
    return status;
  const LargeKernel::State state = row_kernel.on(device, grpo_loss_row_kernel<T, CAP>, false);
  if (state.error) return state.error;
  constexpr int64_t round_bytes = kRowThreads * 16;
  const int64_t room = (device.shared_for(2) - int64_t(sizeof(RowShared))) / round_bytes;
  const int64_t rounds = (row_bytes + round_bytes - 1) / round_bytes - kHeld;
  const int kept = rounds < 0 ? 0 : static_cast<int>(rounds < room ? rounds : room);
  const Shape shape{args.rows, kRowThreads, 1, sizeof(RowShared) + size_t(kept) * round_bytes};
  return launch(grpo_loss_row_kernel<T, CAP>, shape, stream, args, scale, kept);
}

template <typename T>
int launch_dtype(const GrpoLossArgs& args, void* stream) {
  return args.softcap > 0.0 ? launch_rows<T, true>(args, stream) : launch_rows<T, false>(args, stream);
}

}  // namespace

int grpo_loss(const GrpoLossArgs& args, void* stream) {
  if (args.rows == 0) return kOk;
  switch (args.dtype) {
    case kFloat32: return launch_dtype<float>(args, stream);
    case kBFloat16: return launch_dtype<__nv_bfloat16>(args, stream);
    case kFloat16: return launch_dtype<__half>(args, stream);
    default: return kBadDtype;
  }
}

}  // namespace regrpo::cuda
