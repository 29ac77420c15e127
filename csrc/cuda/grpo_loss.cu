// grpo_loss: one CTA a row; the row's sums, the token's objective, then its gradient, whose read comes from L2.
#include "cuda/common.cuh"
#include "objective.h"

namespace regrpo::cuda {

namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) grpo_loss_kernel(const GrpoLossArgs args) {
  const int64_t r = blockIdx.x;
  T* out = args.dlogits.data ? row_at<T>(args.dlogits, r) : nullptr;
  if (!args.mask[r]) {
    if (threadIdx.x < kGrpoStats) args.stats[threadIdx.x * args.rows + r] = 0.0f;
    if (out) zero_row(out, args.vocab);
    return;
  }
  const T* row = row_at<T>(args.logits, r);
  const int64_t label = args.labels[r];
  const float inv_temperature = float(1.0 / args.temperature), softcap = float(args.softcap);
  const float z_label = cap(to_float(row[label]), softcap);
  const RowSums sums = row_sums(row, args.vocab, inv_temperature, softcap);
  const RowValues v = row_values(sums, z_label, inv_temperature);
  const TokenObjective token = token_objective(
      args.objective, v.log_prob, token_ratio(v.log_prob, args.old_log_probs ? args.old_log_probs + r : nullptr),
      args.ref_log_probs ? args.ref_log_probs + r : nullptr, args.advantages ? args.advantages[r] : 1.0f);
  if (threadIdx.x == 0) {
    float* stats = args.stats + r;
    stats[kStatLogProb * args.rows] = v.log_prob;
    stats[kStatLse * args.rows] = v.lse;
    stats[kStatEntropy * args.rows] = v.entropy;
    write_stats(args.objective, token, v.entropy, args.weights[r], stats, args.rows);
  }
  if (!out) return;
  const float weight = args.weights[r] * inv_temperature;
  const float g = weight * token.dlog_prob, k = weight * args.objective.entropy_coef;
  const float a = k * inv_temperature / sums.sum;
  const float b = ((k != 0.0f ? k * (v.entropy - v.log_sum) : 0.0f) - g) / sums.sum;
  row_gradient(row, out, args.vocab, label, inv_temperature, softcap, sums.maximum, a, b, g);
}

}  // namespace

int grpo_loss(const GrpoLossArgs& args, void* stream) { REGRPO_LAUNCH_ROWS(grpo_loss_kernel, args, stream) }

}  // namespace regrpo::cuda
