// token_log_probs: one read of each row; backward: one read and one write.
#include "cpu/launch.h"

namespace {

constexpr int64_t kIgnore = -100;

bool labels_in_range(TokenLogProbsArgs& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    if (a.labels[r] == kIgnore || (a.labels[r] >= 0 && a.labels[r] < a.vocab)) continue;
    a.bad_row = r;
    return false;
  }
  return true;
}

template <typename T, bool CAP>
void forward_row(const TokenLogProbsArgs& a, int64_t r, const RowScale& scale) {
  const T* p = row_at<T>(a.logits, r);
  const RowSums sums = a.entropy ? row_forward<T, CAP, true, false>(p, a.vocab, scale, nullptr, nullptr)
                                 : row_forward<T, CAP, false, false>(p, a.vocab, scale, nullptr, nullptr);
  const RowValues row = row_values(sums, Reader<T, CAP>(scale).scalar(p + a.labels[r]), scale);
  a.log_probs[r] = row.log_prob;
  a.lse[r] = row.lse;
  a.reference[r] = sums.m;
  a.sum[r] = float(sums.sum);
  if (a.entropy) a.entropy[r] = float(row.entropy);
}

template <typename T>
int forward(TokenLogProbsArgs& a, int num_threads) {
  if (!labels_in_range(a)) return kBadLabel;
  const RowScale scale{1.0 / a.temperature, float(a.softcap)};
  for_each_row(a.rows, a.vocab, num_threads, [&](int64_t r, int64_t) {
    if (a.labels[r] == kIgnore) {
      a.log_probs[r] = a.lse[r] = a.reference[r] = a.sum[r] = 0.0f;
      if (a.entropy) a.entropy[r] = 0.0f;
    } else if (scale.softcap > 0.0f) {
      forward_row<T, true>(a, r, scale);
    } else {
      forward_row<T, false>(a, r, scale);
    }
  });
  return kOk;
}

template <typename T, bool CAP, bool STREAM>
void backward_row(const TokenLogProbsArgs& a, int64_t r, const RowScale& scale) {
  const double g = a.dlog_probs[r] * scale.inv_temperature;
  const double k = a.dentropy ? -a.dentropy[r] * scale.inv_temperature : 0.0;
  const RowGradient gradient(a.reference[r], a.sum[r], a.dentropy ? a.entropy[r] : 0.0, g, k);
  const T* p = row_at<T>(a.logits, r);
  T* out = row_at<T>(a.dlogits, r);
  if (gradient.a != 0.0) {
    row_gradient<T, CAP, true, STREAM>(p, out, a.vocab, a.labels[r], scale, gradient);
  } else {
    row_gradient<T, CAP, false, STREAM>(p, out, a.vocab, a.labels[r], scale, gradient);
  }
}

template <typename T>
int backward(TokenLogProbsArgs& a, int num_threads) {
  const RowScale scale{1.0 / a.temperature, float(a.softcap)};
  const bool fresh = a.dlogits.data != a.logits.data;
  const bool stream = fresh && is_aligned<T>(a.dlogits);
  if (fresh) advise_huge_pages(a.dlogits.data, a.rows * a.vocab * int64_t(sizeof(T)));
  for_each_row(a.rows, a.vocab, num_threads, [&](int64_t r, int64_t) {
    if (a.labels[r] == kIgnore || (a.dlog_probs[r] == 0.0f && (!a.dentropy || a.dentropy[r] == 0.0f))) {
      memset(row_at<T>(a.dlogits, r), 0, a.vocab * sizeof(T));
    } else if (scale.softcap > 0.0f) {
      stream ? backward_row<T, true, true>(a, r, scale) : backward_row<T, true, false>(a, r, scale);
    } else {
      stream ? backward_row<T, false, true>(a, r, scale) : backward_row<T, false, false>(a, r, scale);
    }
  });
  return kOk;
}

}  // namespace

namespace regrpo::cpu::REGRPO_ISA {

int token_log_probs(TokenLogProbsArgs& args, int num_threads) {
  REGRPO_FOR_DTYPE(args.dtype, forward, args, num_threads)
}

int token_log_probs_backward(TokenLogProbsArgs& args, int num_threads) {
  REGRPO_FOR_DTYPE(args.dtype, backward, args, num_threads)
}

}  // namespace regrpo::cpu::REGRPO_ISA
