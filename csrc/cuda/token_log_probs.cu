// token_log_probs: one CTA a row, one read; backward: one read and one write.
#include "cuda/common.cuh"

namespace regrpo::cuda {

namespace {

constexpr int64_t kIgnore = -100;

template <typename T>
__global__ void __launch_bounds__(kThreads) token_log_probs_fwd_kernel(const TokenLogProbsArgs a) {
  const int64_t r = blockIdx.x;
  const int64_t label = a.labels[r];
  if (label == kIgnore) {
    if (threadIdx.x == 0) {
      a.log_probs[r] = a.lse[r] = 0.0f;
      if (a.entropy) a.entropy[r] = 0.0f;
    }
    return;
  }
  const T* row = row_at<T>(a.logits, r);
  const float inv_temperature = float(1.0 / a.temperature), softcap = float(a.softcap);
  const RowSums sums = row_sums(row, a.vocab, inv_temperature, softcap);
  if (threadIdx.x == 0) {
    const RowValues v = row_values(sums, cap(to_float(row[label]), softcap), inv_temperature);
    a.log_probs[r] = v.log_prob;
    a.lse[r] = v.lse;
    if (a.entropy) a.entropy[r] = v.entropy;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) token_log_probs_bwd_kernel(const TokenLogProbsArgs args) {
  const int64_t r = blockIdx.x;
  const int64_t label = args.labels[r];
  T* out = row_at<T>(args.dlogits, r);
  if (label == kIgnore) return zero_row(out, args.vocab);
  const float inv_temperature = float(1.0 / args.temperature);
  const float g = args.dlog_probs[r] * inv_temperature;
  const float k = args.dentropy ? -args.dentropy[r] * inv_temperature : 0.0f;
  const float a = k * inv_temperature, b = (args.dentropy ? k * args.entropy[r] : 0.0f) - g;
  // p = exp((z - lse * temperature) / temperature)
  row_gradient(row_at<T>(args.logits, r), out, args.vocab, label, inv_temperature, float(args.softcap),
               float(args.lse[r] * args.temperature), a, b, g);
}

}  // namespace

int token_log_probs(const TokenLogProbsArgs& args, void* stream) {
  REGRPO_LAUNCH_ROWS(token_log_probs_fwd_kernel, args, stream)
}

int token_log_probs_backward(const TokenLogProbsArgs& args, void* stream) {
  REGRPO_LAUNCH_ROWS(token_log_probs_bwd_kernel, args, stream)
}

}  // namespace regrpo::cuda
