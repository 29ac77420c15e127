// Group-relative advantages and reflection rewards on the GPU, one launch an op. Sums run in a fixed order (no
// atomics), in fp64.
#include <cuda_runtime.h>

#include <algorithm>

#include "advantages.h"
#include "cuda/reduce.cuh"

namespace regrpo::cuda {
namespace {

// The sequences in [begin, end), or those among them that have own_id where there are ids.
struct Group {
  const int64_t* ids;
  int64_t own_id, begin, end;
  __device__ bool has(int64_t sequence) const { return sequence < end && (!ids || ids[sequence] == own_id); }
};

// Without ids: one block a group. With ids: one block a sequence, and the group belongs to its first member; the
// others find an earlier one and get no sequences. That reads B ids a block from cache and needs no sort and no count
// of groups.
__device__ Group group_of_block(const GroupAdvantagesArgs& args) {
  const int64_t block = static_cast<int64_t>(blockIdx.x);
  if (!args.group_ids) return {nullptr, 0, block * args.group_size, (block + 1) * args.group_size};
  const int64_t own_id = args.group_ids[block];
  for (int64_t last = block; last > 0; last -= blockDim.x) {
    const int64_t i = last - 1 - static_cast<int64_t>(threadIdx.x);
    if (__syncthreads_or(i >= 0 && args.group_ids[i] == own_id)) return {nullptr, 0, 0, 0};
  }
  return {args.group_ids, own_id, block, args.sequences};
}

// Calls visit(i) for this thread's share of the group's members.
template <typename Visit>
__device__ void for_members(const Group& group, Visit visit) {
  for (int64_t i = group.begin + threadIdx.x; i < group.end; i += blockDim.x) {
    if (group.has(i)) visit(i);
  }
}

__device__ Moments block_moments(const float* rewards, const Group& group) {
  double count = 0.0, total = 0.0, low = INFINITY, high = -INFINITY, squares = 0.0;
  for_members(group, [&](int64_t i) {
    const double reward = rewards[i];
    if (reward != reward) return;
    count += 1.0;
    total += reward;
    low = fmin(low, reward);
    high = fmax(high, reward);
  });
  Moments moments;
  moments.count = block_reduce(count, 0.0, Sum());
  moments.mean = block_reduce(total, 0.0, Sum()) / fmax(moments.count, 1.0);
  moments.varies = block_reduce(high, -INFINITY, Max()) > block_reduce(low, INFINITY, Min());
  for_members(group, [&](int64_t i) {
    const double deviation = rewards[i] - moments.mean;
    if (deviation == deviation) squares += deviation * deviation;
  });
  moments.squares = block_reduce(squares, 0.0, Sum());
  return moments;
}

// The rewards that it reads are there for every thread of the block.
__device__ void write_advantages(const GroupAdvantagesArgs& args, const Group& group) {
  const Moments own = block_moments(args.rewards, group);
  const Moments scale =
      args.rule.scale == kScaleBatch ? block_moments(args.rewards, {nullptr, 0, 0, args.sequences}) : own;
  const AdvantageLine line = advantage_line(args.rule, own, scale);
  for_members(group, [&](int64_t i) { args.advantages[i] = advantage_of(args.rewards[i], line, args.rule.clip); });
}

__global__ void __launch_bounds__(kMaxThreads) group_advantages_kernel(GroupAdvantagesArgs args) {
  const Group group = group_of_block(args);
  if (group.begin < group.end) write_advantages(args, group);
}

// Calls visit(t, segment) for this thread's share of a sequence's tokens; `team` consecutive threads share a sequence.
// Several loads are on their way before the first visit, whose stores the compiler may not move them across. Bounds are
// clamped: on the GPU nobody has looked at the values of cu_seqlens.
template <typename Id, typename Visit>
__device__ void for_tokens(const ReflectionAdvantagesArgs& args, int64_t sequence, int team, Visit visit) {
  constexpr int kLoads = 8;
  const auto clamped = [&](int64_t bound) { return bound < 0 ? 0 : (bound > args.tokens ? args.tokens : bound); };
  const Id* segment_ids = static_cast<const Id*>(args.segment_ids);
  const int64_t end = clamped(args.cu_seqlens[sequence + 1]);
  for (int64_t t = clamped(args.cu_seqlens[sequence]) + threadIdx.x % team; t < end; t += kLoads * team) {
    Id segments[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) segments[k] = t + k * team < end ? segment_ids[t + k * team] : Id{};
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (t + k * team < end) visit(t + k * team, segments[k]);
    }
  }
}

template <typename Id>
__device__ void write_rewards(const ReflectionAdvantagesArgs& args, const Group& group, int team) {
  __shared__ int partial[kMaxThreads / kWarp];
  const int warp = threadIdx.x / kWarp, teams = blockDim.x / team;
  for (int64_t first = group.begin; first < group.end; first += teams) {
    const int64_t b = first + threadIdx.x / team;
    const bool member = group.has(b);
    int count = 0;
    if (member) for_tokens<Id>(args, b, team, [&](int64_t, Id segment) { count += segment == kSegmentReflection; });
    for (int lane = kWarp / 2; lane > 0; lane /= 2) count += __shfl_xor_sync(0xffffffffu, count, lane);
    if (threadIdx.x % kWarp == 0) partial[warp] = count;
    __syncthreads();
    if (member && threadIdx.x % team == 0) {
      int64_t total = 0;
      for (int k = 0; k < team / kWarp; ++k) total += partial[warp + k];
      args.reflection_tokens[b] = total;
      args.rewards[b] = reflection_reward(args, b, total);
    }
    __syncthreads();
  }
}

template <typename Id>
__device__ void write_tokens(const ReflectionAdvantagesArgs& args, const Group& group, int team) {
  for (int64_t b = group.begin + threadIdx.x / team; b < group.end; b += blockDim.x / team) {
    if (!group.has(b)) continue;
    const float advantage = args.group.advantages[b];
    for_tokens<Id>(args, b, team, [&](int64_t t, Id segment) {
      const bool trained = is_trained(segment);
      args.loss_mask[t] = trained;
      args.token_advantages[t] = trained ? advantage : 0.0f;
    });
  }
}

// One block counts, rewards, compares and broadcasts for all sequences of its group, so that nothing waits for another
// block. The standard deviation of the batch needs all rewards: every block then computes them all and writes the same
// bits.
template <typename Id>
__global__ void __launch_bounds__(kMaxThreads) reflection_advantages_kernel(ReflectionAdvantagesArgs args, int team) {
  const Group group = group_of_block(args.group);
  if (group.begin == group.end) return;
  const bool all = args.group.rule.scale == kScaleBatch;
  write_rewards<Id>(args, all ? Group{nullptr, 0, 0, args.group.sequences} : group, team);
  write_advantages(args.group, group);
  __syncthreads();
  write_tokens<Id>(args, group, team);
}

unsigned blocks_of(const GroupAdvantagesArgs& args) {
  return static_cast<unsigned>(args.group_ids ? args.sequences : args.sequences / args.group_size);
}

template <typename Id>
int launch_reflection_advantages(const ReflectionAdvantagesArgs& args, void* stream) {
  int team = kWarp;  // threads that share a sequence: more where the group has fewer sequences than the block has warps
  while (!args.group.group_ids && 2 * team * args.group.group_size <= kMaxThreads) team *= 2;
  reflection_advantages_kernel<Id>
      <<<blocks_of(args.group), kMaxThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, team);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int group_advantages(const GroupAdvantagesArgs& args, void* stream) {
  if (args.sequences == 0) return kOk;
  const int64_t span = args.group_ids ? args.sequences : args.group_size;
  const int threads = static_cast<int>(std::min<int64_t>((span + kWarp - 1) / kWarp * kWarp, kMaxThreads));
  group_advantages_kernel<<<blocks_of(args), threads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

int reflection_advantages(const ReflectionAdvantagesArgs& args, void* stream) {
  if (args.group.sequences == 0) return kOk;
  switch (args.segment_id_bytes) {
    case 1: return launch_reflection_advantages<int8_t>(args, stream);
    case 4: return launch_reflection_advantages<int32_t>(args, stream);
    case 8: return launch_reflection_advantages<int64_t>(args, stream);
    default: return kBadDtype;
  }
}

}  // namespace regrpo::cuda
