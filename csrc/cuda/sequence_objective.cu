// Sequence-level ratios, between the two row passes: one block a sequence.
#include "cuda/reduce.cuh"
#include "objective.h"

namespace regrpo::cuda {
namespace {

__global__ void __launch_bounds__(kMaxThreads) sequence_objective_kernel(SequenceObjectiveArgs a) {
  // clamped: on the GPU nobody has looked at the values of cu_seqlens
  const int64_t begin = a.cu_seqlens[blockIdx.x] < 0 ? 0 : a.cu_seqlens[blockIdx.x];
  const int64_t bound = a.cu_seqlens[blockIdx.x + 1], end = bound > a.tokens ? a.tokens : bound;
  const float* log_probs = a.stats + kStatLogProb * a.tokens;
  const float* entropy = a.stats + kStatEntropy * a.tokens;
  float mean = 0.0f;
  if (a.old_log_probs) {
    double total = 0.0, count = 0.0;
    for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x) {
      if (!a.mask[t]) continue;
      total += token_log_ratio(log_probs[t], a.old_log_probs + t);
      count += 1.0;
    }
    total = block_reduce(total, 0.0, Sum());
    count = block_reduce(count, 0.0, Sum());
    mean = count > 0.0 ? float(total / count) : 0.0f;
  }
  for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x) {
    float* stats = a.stats + t;
    if (!a.mask[t]) {
      for (int s = 0; s < kGrpoStats; ++s) stats[s * a.tokens] = 0.0f;
      continue;
    }
    const TokenObjective token =
        token_objective(a.objective, log_probs[t], sequence_ratio(log_probs[t], mean),
                        a.ref_log_probs ? a.ref_log_probs + t : nullptr, a.advantages ? a.advantages[t] : 1.0f);
    write_stats(a.objective, token, entropy[t], a.weights[t], stats, a.tokens);
  }
}

}  // namespace

int sequence_objective(const SequenceObjectiveArgs& args, void* stream) {
  if (args.sequences == 0) return kOk;
  const auto blocks = static_cast<unsigned>(args.sequences);
  sequence_objective_kernel<<<blocks, kMaxThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace regrpo::cuda
