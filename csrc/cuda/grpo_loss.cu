// grpo_loss: a row's sums, the token's objective, then the row's gradient. Two kernels, chosen on the host:
//   cluster  (compute capability 9.x and 10.x) the CTAs of a cluster hold the row: one read, one write;
//   row      (all others, and rows too long for a cluster) one CTA a row keeps what fits in registers and shared
//            memory, and reads the rest again from L2.
#include "cuda/common.cuh"
#include "cuda/launch.cuh"
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
  return {sums.maximum, k * scale.inv_temperature / sums.sum,
          ((k != 0.0f ? k * (v.entropy - v.log_sum) : 0.0f) - g) / sums.sum, g};
}

__device__ __forceinline__ void skip_stats(const GrpoLossArgs& args, int64_t r) {
  if (threadIdx.x < kGrpoStats) args.stats[threadIdx.x * args.rows + r] = 0.0f;
}

// ---- cluster ---------------------------------------------------------------------------------------------
constexpr int kClusterThreads = 384;
constexpr int kMaxRanks = 16;
constexpr int kStages = 8;  // parts of a CTA's slice that are waited for one by one

// The slice's packets follow it in shared memory.
struct alignas(128) ClusterShared {
  TransactionBarrier loaded[kStages];
  RowSums warps[kClusterThreads / kLanes];
  RowSums ranks[kMaxRanks];
};

// Packets of a slice, in 128-byte lines. Bounded by the whole row's, so it does not depend on the row's alignment.
__host__ __device__ inline int64_t slice_packets(int64_t row_bytes, int ranks) {
  return (row_bytes / 128 + ranks) / ranks * 8;
}

template <typename T, bool CAP, bool ENTROPY>
__device__ __forceinline__ void write_slice(const T* row, T* out, int64_t vocab, const RowLayout<T>& layout,
                                            int64_t label, float x_label, T edge, const uint4* slice, int begin,
                                            int count, const RowGradient& gradient, const RowScale& scale) {
  const GradientWriter<T, CAP, ENTROPY> writer(gradient, scale, layout, label, x_label);
  const unsigned rank = cluster_rank();
  if (!same_alignment(row, out)) {
    const unsigned thread = rank * kClusterThreads + threadIdx.x;
    return writer.elements(row, out, vocab, thread, cluster_size() * kClusterThreads);
  }
  uint4* packets = reinterpret_cast<uint4*>(out + layout.head) + begin;
  for (int p = threadIdx.x; p < count; p += kClusterThreads) packets[p] = writer.packet(slice[p], begin + p);
  if (rank == 0 && threadIdx.x < layout.edges) {
    const int64_t i = layout.edge(threadIdx.x);
    writer.element(edge, i, out[i]);
  }
}

template <typename T, bool CAP>
__device__ __forceinline__ void sweep_cluster(const GrpoLossArgs& args, const RowScale& scale) {
  const unsigned rank = cluster_rank(), ranks = cluster_size();
  const int64_t r = blockIdx.x / ranks;
  const bool trained = args.mask[r];
  T* out = args.dlogits.data ? row_at<T>(args.dlogits, r) : nullptr;
  if (!trained) {
    if (rank == 0) skip_stats(args, r);
    if (out) zero_row(out, args.vocab, rank * kClusterThreads + threadIdx.x, ranks * kClusterThreads);
    return;
  }
  const T* row = row_at<T>(args.logits, r);
  const RowLayout<T> layout(row, args.vocab);
  auto& shared = *reinterpret_cast<ClusterShared*>(dynamic_shared_memory());
  uint4* slice = reinterpret_cast<uint4*>(&shared + 1);
  const int per_rank = static_cast<int>(slice_packets(args.vocab * int64_t(sizeof(T)), ranks));
  const int begin = min(layout.packets, static_cast<int>(rank) * per_rank);
  const int count = min(layout.packets - begin, per_rank);
  const int per_stage = (count + kStages - 1) / kStages;

  if (threadIdx.x < kStages) {
    const int first = min(count, static_cast<int>(threadIdx.x) * per_stage);
    const unsigned bytes = min(count - first, per_stage) * 16;
    TransactionBarrier* loaded = &shared.loaded[threadIdx.x];
    init_barrier(loaded);
    publish_barriers();
    if (bytes > 0) {
      expect_bytes(loaded, bytes);
      bulk_load(slice + first, reinterpret_cast<const uint4*>(row + layout.head) + begin + first, bytes, loaded);
    }
  }
  cluster_arrive();  // "this CTA runs": others may write to its shared memory
  // read before anyone writes the gradient, which may replace the logits
  const int64_t label = args.labels[r];
  const float x_label = to_float(row[label]);
  const bool has_edge = rank == 0 && threadIdx.x < layout.edges;
  T edge{};
  if (has_edge) edge = row[layout.edge(threadIdx.x)];
  __syncthreads();  // the barriers are there

  RowSums sums;
  for (int stage = 0, first = 0; first < count; ++stage, first += per_stage) {
    wait_barrier(&shared.loaded[stage], 0);
    const int end = min(count, first + per_stage);
    for (int p = first + threadIdx.x; p < end; p += kClusterThreads) add_packet<T, CAP>(sums, slice[p], scale);
  }
  if (has_edge) add_edge<T, CAP>(sums, edge, scale);
  sums = merge_block<kClusterThreads>(sums, shared.warps, scale);

  // Every CTA gets every CTA's sums and merges them in the order of the ranks. Nobody reads another's memory, so a CTA
  // may end while others go on.
  cluster_wait();
  if (threadIdx.x < ranks) {
    store_to_rank(&shared.ranks[rank].maximum, threadIdx.x, sums.maximum);
    store_to_rank(&shared.ranks[rank].sum, threadIdx.x, sums.sum);
    store_to_rank(&shared.ranks[rank].moment, threadIdx.x, sums.moment);
  }
  cluster_arrive();
  cluster_wait();
  sums = merge(shared.ranks, ranks, scale);

  const RowGradient gradient = token_gradient(args, r, sums, capped<CAP>(x_label, scale), scale,
                                              rank == 0 && threadIdx.x == 0);
  if (!out) return;
  if (gradient.at_label == 0.0f && gradient.a == 0.0f) {
    zero_row(out, args.vocab, rank * kClusterThreads + threadIdx.x, ranks * kClusterThreads);
  } else if (gradient.a == 0.0f) {
    write_slice<T, CAP, false>(row, out, args.vocab, layout, label, x_label, edge, slice, begin, count, gradient, scale);
  } else {
    write_slice<T, CAP, true>(row, out, args.vocab, layout, label, x_label, edge, slice, begin, count, gradient, scale);
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
struct ClusterPlan {
  int ranks;  // 0: the row does not fit
  int64_t shared_bytes;
};

// The smallest cluster whose slices let three CTAs share a multiprocessor, or two, so that some load while others
// compute; for longer rows, the smallest that holds the row at all. Not every device can schedule 16, so that is last.
ClusterPlan plan_cluster(const Device& device, int64_t row_bytes) {
  const auto bytes = [&](int ranks) { return int64_t(sizeof(ClusterShared)) + slice_packets(row_bytes, ranks) * 16; };
  for (const int blocks : {3, 2, 1})
    for (int ranks = 1; ranks <= kMaxRanks / 2; ranks *= 2)
      if (bytes(ranks) <= device.shared_for(blocks)) return {ranks, bytes(ranks)};
  if (bytes(kMaxRanks) <= device.shared_for(1)) return {kMaxRanks, bytes(kMaxRanks)};
  return {0, 0};
}

template <typename T, bool CAP>
int launch_rows(const GrpoLossArgs& args, void* stream) {
  static LargeKernel cluster_kernel, row_kernel;
  const Device device = current_device();
  if (device.error) return device.error;
  const RowScale scale = row_scale(args.temperature, args.softcap);
  const int64_t row_bytes = args.vocab * int64_t(sizeof(T));

  if (device.has_clusters()) {
    const LargeKernel::State state = cluster_kernel.on(device, grpo_loss_cluster_kernel<T, CAP>, true);
    if (state.error) return state.error;
    const ClusterPlan plan = plan_cluster(device, row_bytes);
    if (plan.ranks && state.ptx_version >= 90) {
      const Shape shape{args.rows * plan.ranks, kClusterThreads, unsigned(plan.ranks), size_t(plan.shared_bytes)};
      return launch(grpo_loss_cluster_kernel<T, CAP>, shape, stream, args, scale);
    }
  }
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
