// Group-relative advantages and reflection rewards on the GPU. Sums run in a fixed order (no atomics), in fp64.
#include <cuda_runtime.h>

#include <algorithm>

#include "advantages.h"
#include "cuda/reduce.cuh"

namespace regrpo::cuda {
namespace {

// Calls visit(i) for this thread's share of the group's members in [begin, end).
template <typename Visit>
__device__ void for_members(const int64_t* group_ids, int64_t own_id, int64_t begin, int64_t end, Visit visit) {
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    if (!group_ids || group_ids[i] == own_id) visit(i);
  }
}

__device__ Moments block_moments(const float* rewards, const int64_t* group_ids, int64_t own_id, int64_t begin,
                                 int64_t end) {
  double count = 0.0, total = 0.0, low = INFINITY, high = -INFINITY, squares = 0.0;
  for_members(group_ids, own_id, begin, end, [&](int64_t i) {
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
  for_members(group_ids, own_id, begin, end, [&](int64_t i) {
    const double deviation = rewards[i] - moments.mean;
    if (deviation == deviation) squares += deviation * deviation;
  });
  moments.squares = block_reduce(squares, 0.0, Sum());
  return moments;
}

// Without ids: one block a group. With ids: one block a sequence, and the group belongs to its first member; the
// others find an earlier one and stop. That reads B ids a block from cache and needs no sort and no count of groups.
__global__ void group_advantages_kernel(GroupAdvantagesArgs args) {
  int64_t begin = static_cast<int64_t>(blockIdx.x), end = args.sequences, own_id = 0;
  if (args.group_ids) {
    own_id = args.group_ids[begin];
    for (int64_t last = begin; last > 0; last -= blockDim.x) {
      const int64_t i = last - 1 - static_cast<int64_t>(threadIdx.x);
      if (__syncthreads_or(i >= 0 && args.group_ids[i] == own_id)) return;
    }
  } else {
    begin *= args.group_size;
    end = begin + args.group_size;
  }
  const Moments group = block_moments(args.rewards, args.group_ids, own_id, begin, end);
  const Moments scale =
      args.rule.scale == kScaleBatch ? block_moments(args.rewards, nullptr, 0, 0, args.sequences) : group;
  const AdvantageLine line = advantage_line(args.rule, group, scale);
  for_members(args.group_ids, own_id, begin, end,
              [&](int64_t i) { args.advantages[i] = advantage_of(args.rewards[i], line, args.rule.clip); });
}

// One block a sequence. Bounds are clamped: on the GPU nobody has looked at the values of cu_seqlens.
__device__ int64_t clamped(int32_t bound, int64_t tokens) {
  return bound < 0 ? 0 : (bound > tokens ? tokens : static_cast<int64_t>(bound));
}

template <typename Id>
__global__ void reflection_rewards_kernel(ReflectionAdvantagesArgs args) {
  const int64_t b = blockIdx.x;
  const Id* segment_ids = static_cast<const Id*>(args.segment_ids);
  const int64_t end = clamped(args.cu_seqlens[b + 1], args.tokens);
  double count = 0.0;
  for (int64_t t = clamped(args.cu_seqlens[b], args.tokens) + threadIdx.x; t < end; t += blockDim.x) {
    count += segment_ids[t] == kSegmentReflection;
  }
  const int64_t total = static_cast<int64_t>(block_reduce(count, 0.0, Sum()));
  if (threadIdx.x == 0) {
    args.reflection_tokens[b] = total;
    args.rewards[b] = reflection_reward(args, b, total);
  }
}

template <typename Id>
__global__ void token_advantages_kernel(ReflectionAdvantagesArgs args) {
  const int64_t b = blockIdx.x;
  const Id* segment_ids = static_cast<const Id*>(args.segment_ids);
  const float advantage = args.group.advantages[b];
  const int64_t end = clamped(args.cu_seqlens[b + 1], args.tokens);
  for (int64_t t = clamped(args.cu_seqlens[b], args.tokens) + threadIdx.x; t < end; t += blockDim.x) {
    const bool trained = is_trained(segment_ids[t]);
    args.loss_mask[t] = trained;
    args.token_advantages[t] = trained ? advantage : 0.0f;
  }
}

template <typename Id>
int launch_reflection_advantages(const ReflectionAdvantagesArgs& args, void* stream) {
  const auto blocks = static_cast<unsigned>(args.group.sequences);
  reflection_rewards_kernel<Id><<<blocks, kMaxThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  if (const int status = group_advantages(args.group, stream)) return status;
  token_advantages_kernel<Id><<<blocks, kMaxThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int group_advantages(const GroupAdvantagesArgs& args, void* stream) {
  if (args.sequences == 0) return kOk;
  const int64_t blocks = args.group_ids ? args.sequences : args.sequences / args.group_size;
  const int64_t span = args.group_ids ? args.sequences : args.group_size;
  const int threads = span <= kWarp ? kWarp : kMaxThreads;
  group_advantages_kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(args);
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
