// The per-token objective: (log_prob, old, ref, advantage) -> (loss, d loss / d log_prob, statistics).
// The formulas are those of the reference in regrpo_kernels/objective.py; C++ and CUDA kernels share this file.
#pragma once
#include <math.h>

#include "ops.h"

#ifdef __CUDACC__
#define REGRPO_HD __host__ __device__
#else
#define REGRPO_HD
#endif

namespace regrpo {

enum Policy : int { kClip = 0, kCispo = 1, kSapo = 2, kReinforce = 3, kNll = 4 };
enum KlEstimator : int { kK1 = 0, kK2 = 1, kK3 = 2 };

struct TokenObjective {
  float loss;       // without the entropy bonus
  float dlog_prob;  // d loss / d log_prob
  float kl, ratio, clip_low, clip_high;
};

// exp(20) is large enough to clip and small enough that its products stay finite.
constexpr float kMaxLogRatio = 20.0f;

static REGRPO_HD inline float clamp_log_ratio(float x) {
  return x < -kMaxLogRatio ? -kMaxLogRatio : (x > kMaxLogRatio ? kMaxLogRatio : x);  // NaN goes through
}

// A label whose logit is -inf has probability 0: its ratio is 0 and there is nothing to push.
static REGRPO_HD inline bool is_forbidden(float log_prob) { return log_prob == -INFINITY; }

struct Ratio {
  float value, slope;  // slope: d ratio / d log_prob
};
// old points at this token's value, or is null.
static REGRPO_HD inline Ratio token_ratio(float log_prob, const float* old) {
  if (is_forbidden(log_prob)) return {0.0f, 0.0f};
  const float raw = old ? log_prob - *old : 0.0f;
  const float r = expf(clamp_log_ratio(raw));
  return {r, fabsf(raw) > kMaxLogRatio ? 0.0f : r};
}
// What a token adds to its sequence's mean.
static REGRPO_HD inline float token_log_ratio(float log_prob, const float* old) {
  return is_forbidden(log_prob) ? -kMaxLogRatio : clamp_log_ratio(log_prob - *old);
}
// exp(sg(mean) + log_prob - sg(log_prob)): the sequence's ratio, with the slope of each token's own log-prob.
static REGRPO_HD inline Ratio sequence_ratio(float log_prob, float mean_log_ratio) {
  if (is_forbidden(log_prob)) return {0.0f, 0.0f};
  const float r = expf(mean_log_ratio);
  return {r, r};
}

// ref points at this token's value, or is null.
static REGRPO_HD inline TokenObjective token_objective(const ObjectiveParams& o, float log_prob, Ratio ratio,
                                                       const float* ref, float advantage) {
  TokenObjective t{};
  const bool forbidden = is_forbidden(log_prob);
  const float r = ratio.value, dr = ratio.slope;
  const float low = 1.0f - o.epsilon_low, high = 1.0f + o.epsilon_high;
  const float a = advantage;
  t.ratio = r;
  t.clip_low = (r < low && a < 0.0f) ? 1.0f : 0.0f;
  t.clip_high = (r > high && a > 0.0f) ? 1.0f : 0.0f;

  if (o.policy == kClip) {
    const bool capped = o.delta > 0.0f && r > o.delta;
    const float free_term = (capped ? o.delta : r) * a;
    const float clipped_term = fminf(fmaxf(r, low), high) * a;
    if (free_term <= clipped_term) {
      t.loss = -free_term;
      t.dlog_prob = capped ? 0.0f : -a * dr;
    } else {
      t.loss = -clipped_term;
      t.dlog_prob = r < low || r > high ? 0.0f : -a * dr;  // inside the interval where delta lies in it, too
    }
  } else if (o.policy == kCispo) {
    const float c = fminf(fmaxf(r, low), high);
    t.loss = c * a == 0.0f ? 0.0f : -c * a * log_prob;
    t.dlog_prob = -c * a;
  } else if (o.policy == kSapo) {
    const float tau = a > 0.0f ? o.sapo_tau_pos : o.sapo_tau_neg;
    const float x = tau * (r - 1.0f), e = expf(-fabsf(x));
    const float s = (x < 0.0f ? e : 1.0f) / (1.0f + e);
    t.loss = -4.0f / tau * s * a;
    t.dlog_prob = -4.0f * (e / ((1.0f + e) * (1.0f + e))) * a * dr;  // s (1 - s) would cancel
  } else {
    const float c = o.policy == kReinforce ? a : 1.0f;
    t.loss = c == 0.0f ? 0.0f : -c * log_prob;
    t.dlog_prob = -c;
  }

  if (ref) {
    const float x = forbidden && *ref == -INFINITY ? 0.0f : *ref - log_prob;
    const float k = clamp_log_ratio(x);
    const bool flat = !(fabsf(x) <= kMaxLogRatio);
    float dkl;
    if (o.kl_estimator == kK3) {
      const float e = expm1f(k);
      t.kl = e - k;
      dkl = -e;
    } else {  // k1 has k2's gradient: its own is constant and regularises nothing
      t.kl = o.kl_estimator == kK1 ? -k : 0.5f * k * k;
      dkl = -k;
    }
    if (o.beta != 0.0f) {
      t.loss += o.beta * t.kl;
      if (!flat) t.dlog_prob += o.beta * dkl;
    }
  }
  return t;
}

// Everything but log_prob, lse and entropy, which the caller has.
static REGRPO_HD inline void write_stats(const ObjectiveParams& o, const TokenObjective& t, float entropy, float weight,
                                         float* stats, int64_t tokens) {
  stats[kStatLoss * tokens] = t.loss - (o.entropy_coef != 0.0f ? o.entropy_coef * entropy : 0.0f);
  stats[kStatKl * tokens] = t.kl;
  stats[kStatRatio * tokens] = t.ratio;
  stats[kStatClipLow * tokens] = t.clip_low;
  stats[kStatClipHigh * tokens] = t.clip_high;
  stats[kStatDLogProb * tokens] = weight * t.dlog_prob;
}

}  // namespace regrpo
