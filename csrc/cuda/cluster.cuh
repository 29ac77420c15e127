// A row held by the CTAs of a thread-block cluster: each brings a slice of it into its shared memory by bulk copies,
// and all end up with the whole row's sums. Compute capability 9.x and 10.x.
#pragma once
#include "cuda/common.cuh"
#include "cuda/launch.cuh"

namespace regrpo::cuda {

constexpr int kClusterThreads = 384;
constexpr int kMaxRanks = 16;
constexpr int kStages = 8;  // parts of a slice that are waited for one by one

// The slice's packets follow it in shared memory.
struct alignas(128) ClusterShared {
  TransactionBarrier loaded[kStages];
  RowSums warps[kClusterThreads / kLanes];
  RowSums ranks[kMaxRanks];
};

// Packets of a slice, in 128-byte lines: enough for the whole row, however it is aligned.
__host__ __device__ inline int64_t slice_packets(int64_t row_bytes, int ranks) {
  return (row_bytes / 128 + ranks) / ranks * 8;
}

template <typename T>
class RowCluster {
 public:
  // Starts the copies. Every thread of the cluster constructs it and calls sums() once.
  __device__ __forceinline__ RowCluster(const T* row, int64_t vocab)
      : layout(row, vocab), rank(static_cast<int>(cluster_rank())), ranks(static_cast<int>(cluster_size())),
        shared_(*reinterpret_cast<ClusterShared*>(dynamic_shared_memory())) {
    const int per_rank = static_cast<int>(slice_packets(vocab * int64_t(sizeof(T)), ranks));
    begin = min(layout.packets, rank * per_rank);
    count = min(layout.packets - begin, per_rank);
    slice = reinterpret_cast<uint4*>(&shared_ + 1);
    per_stage_ = (count + kStages - 1) / kStages;
    if (threadIdx.x < kStages) {
      const int first = min(count, static_cast<int>(threadIdx.x) * per_stage_);
      const unsigned bytes = min(count - first, per_stage_) * 16;
      TransactionBarrier* loaded = &shared_.loaded[threadIdx.x];
      init_barrier(loaded);
      publish_barriers();
      if (bytes > 0) {
        expect_bytes(loaded, bytes);
        bulk_load(slice + first, reinterpret_cast<const uint4*>(row + layout.head) + begin + first, bytes, loaded);
      }
    }
    cluster_arrive();  // "this CTA runs": others may write to its shared memory
    has_edge = rank == 0 && threadIdx.x < layout.edges;
    if (has_edge) edge = row[layout.edge(threadIdx.x)];
    __syncthreads();  // the barriers are there
  }

  // The whole row's sums, with the same bits in every thread of the cluster. All threads of the cluster have read what
  // they read of the row before.
  template <bool CAP>
  __device__ __forceinline__ RowSums sums(const RowScale& scale) {
    RowSums sums;
    for (int stage = 0, first = 0; first < count; ++stage, first += per_stage_) {
      wait_barrier(&shared_.loaded[stage], 0);
      const int end = min(count, first + per_stage_);
      for (int p = first + threadIdx.x; p < end; p += kClusterThreads) add_packet<T, CAP>(sums, slice[p], scale);
    }
    if (has_edge) add_edge<T, CAP>(sums, edge, scale);
    sums = merge_block<kClusterThreads>(sums, shared_.warps, scale);
    // Every CTA gets every CTA's sums and merges them in the order of the ranks. Nobody reads another's memory, so a
    // CTA may end while others go on.
    cluster_wait();
    if (threadIdx.x < ranks) {
      store_to_rank(&shared_.ranks[rank].maximum, threadIdx.x, sums.maximum);
      store_to_rank(&shared_.ranks[rank].sum, threadIdx.x, sums.sum);
      store_to_rank(&shared_.ranks[rank].moment, threadIdx.x, sums.moment);
    }
    cluster_arrive();
    cluster_wait();
    return merge(shared_.ranks, ranks, scale);
  }

  const RowLayout<T> layout;
  const int rank, ranks;
  int begin, count;  // of the slice's packets in the row
  uint4* slice;
  bool has_edge;  // this thread has an element of the row's head or tail
  T edge{};

 private:
  ClusterShared& shared_;
  int per_stage_;
};

// ---- host ------------------------------------------------------------------------------------------------
struct ClusterPlan {
  int ranks;  // 0: the row does not fit
  int64_t shared_bytes;
};

// The smallest cluster whose slices let three CTAs share a multiprocessor, or two, so that some load while others
// compute; for longer rows, the smallest that holds the row at all. Not every device can schedule 16, so that is last.
inline ClusterPlan plan_cluster(const Device& device, int64_t row_bytes) {
  const auto bytes = [&](int ranks) { return int64_t(sizeof(ClusterShared)) + slice_packets(row_bytes, ranks) * 16; };
  for (const int blocks : {3, 2, 1})
    for (int ranks = 1; ranks <= kMaxRanks / 2; ranks *= 2)
      if (bytes(ranks) <= device.shared_for(blocks)) return {ranks, bytes(ranks)};
  if (bytes(kMaxRanks) <= device.shared_for(1)) return {kMaxRanks, bytes(kMaxRanks)};
  return {0, 0};
}

// Launches a kernel of row clusters, or returns false where the device, the code that it runs, or the row's length asks
// for another kernel.
template <typename... P>
bool launch_clusters(LargeKernel& state, void (*kernel)(P...), const Device& device, int64_t rows, int64_t row_bytes,
                     void* stream, int* status, P... args) {
  if (!device.has_clusters()) return false;
  const ClusterPlan plan = plan_cluster(device, row_bytes);
  const LargeKernel::State on_device = state.on(device, kernel, true);
  *status = on_device.error;
  if (*status) return true;
  if (plan.ranks == 0 || on_device.ptx_version < 90) return false;
  const Shape shape{rows * plan.ranks, kClusterThreads, unsigned(plan.ranks), size_t(plan.shared_bytes)};
  *status = launch(kernel, shape, stream, args...);
  return true;
}

}  // namespace regrpo::cuda
