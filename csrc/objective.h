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
  return fminf(fmaxf(x, -kMaxLogRatio), kMaxLogRatio);
}

// old and ref point at this token's value, or are null.
static REGRPO_HD inline TokenObjective token_objective(const ObjectiveParams& o, float log_prob, const float* old,
                                                       const float* ref, float advantage) {
  TokenObjective t{};
  const float raw = old ? log_prob - *old : 0.0f;
  const float d = clamp_log_ratio(raw);
  const bool forbidden = log_prob == -INFINITY;  // the label's logit is -inf: probability 0, nothing to push
  const float r = forbidden ? 0.0f : expf(d);
  const float dr = (forbidden || fabsf(raw) > kMaxLogRatio) ? 0.0f : r;  // d ratio / d log_prob
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
      t.loss = -clipped_term;  // only smaller where r is outside the interval, where the clip is flat
    }
  } else if (o.policy == kCispo) {
    const float c = fminf(fmaxf(r, low), high);
    t.loss = c * a == 0.0f ? 0.0f : -c * a * log_prob;
    t.dlog_prob = -c * a;
  } else if (o.policy == kSapo) {
    const float tau = a > 0.0f ? o.sapo_tau_pos : o.sapo_tau_neg;
    const float s = 1.0f / (1.0f + expf(-tau * (r - 1.0f)));
    t.loss = -4.0f / tau * s * a;
    t.dlog_prob = -4.0f * s * (1.0f - s) * a * dr;
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

}  // namespace regrpo
