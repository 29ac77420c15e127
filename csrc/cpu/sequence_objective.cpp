// Sequence-level ratios, between the two row passes. Linear in tokens, so one thread.
#include <initializer_list>

#include "objective.h"

namespace regrpo::cpu {

int sequence_objective(const SequenceObjectiveArgs& a) {
  const float* log_probs = a.stats + kStatLogProb * a.tokens;
  const float* entropy = a.stats + kStatEntropy * a.tokens;
  const auto at = [](const float* x, int64_t t) { return x ? x + t : nullptr; };
  for (int64_t b = 0; b < a.sequences; ++b) {
    const int64_t begin = a.cu_seqlens[b], end = a.cu_seqlens[b + 1];
    double total = 0.0, count = 0.0;
    for (int64_t t = begin; t < end && a.old_log_probs; ++t) {
      if (!a.mask[t]) continue;
      total += token_log_ratio(log_probs[t], a.old_log_probs + t);
      count += 1.0;
    }
    const float mean = count > 0.0 ? float(total / count) : 0.0f;
    for (int64_t t = begin; t < end; ++t) {
      float* stats = a.stats + t;
      if (!a.mask[t]) {
        for (const int s : {kStatLoss, kStatKl, kStatRatio, kStatClipLow, kStatClipHigh, kStatDLogProb})
          stats[s * a.tokens] = 0.0f;
        continue;
      }
      const TokenObjective token = token_objective(a.objective, log_probs[t], sequence_ratio(log_probs[t], mean),
                                                   at(a.ref_log_probs, t), a.advantages ? a.advantages[t] : 1.0f);
      write_stats(a.objective, token, entropy[t], a.weights[t], stats, a.tokens);
    }
  }
  return kOk;
}

}  // namespace regrpo::cpu
