// What the C++ and the CUDA kernels of the advantage ops share: a group's moments, and one reward -> one advantage.
#pragma once
#include <math.h>

#include "objective.h"  // REGRPO_HD
#include "ops.h"

namespace regrpo {

// Of the rewards of a group (or of the batch) that are not NaN, in fp64.
struct Moments {
  double count, mean, squares;  // squares: sum of squared deviations from the mean
  bool varies;                  // max > min; decided on the rewards themselves, so rounding of the mean plays no part
};

// A_i = (R_i - centre) * factor. Leave-one-out is n / (n - 1) times the distance to the mean.
struct AdvantageLine {
  double centre, factor;
};

// `scale`: the moments that the standard deviation comes from, of the group or of the batch.
static REGRPO_HD inline AdvantageLine advantage_line(const AdvantageRule& rule, const Moments& group,
                                                         const Moments& scale) {
  if (!group.varies) return {0.0, 0.0};  // also a group of one: nothing to compare, exactly 0
  AdvantageLine line = {rule.baseline == kBaselineNone ? 0.0 : group.mean, 1.0};
  if (rule.baseline == kBaselineLeaveOneOut) line.factor = group.count / (group.count - 1.0);
  if (rule.scale != kScaleNone) {
    const double std = sqrt(scale.squares / (scale.count - rule.ddof));
    line.factor /= (std > rule.min_std ? std : rule.min_std) + rule.eps;
  }
  return line;
}

static REGRPO_HD inline float advantage_of(float reward, const AdvantageLine& line, double clip) {
  if (reward != reward || line.factor == 0.0) return 0.0f;
  const double advantage = (static_cast<double>(reward) - line.centre) * line.factor;
  return static_cast<float>(advantage < -clip ? -clip : (advantage > clip ? clip : advantage));
}

static REGRPO_HD inline bool is_trained(int64_t segment) {
  return (segment == kSegmentAction) | (segment == kSegmentReflection);  // no branch: segments alternate
}

// R = lambda_exec * success - eta * (reflection tokens / tokens_per_cost) + lambda_val * V
static REGRPO_HD inline float reflection_reward(const ReflectionAdvantagesArgs& args, int64_t sequence,
                                                    int64_t reflection_tokens) {
  double reward = args.lambda_exec * args.success[sequence] -
                  args.eta * (static_cast<double>(reflection_tokens) / args.tokens_per_cost);
  if (args.verifier_scores) reward += args.lambda_val * args.verifier_scores[sequence];
  return static_cast<float>(reward);
}

}  // namespace regrpo
