// grpo_loss: one fused sweep. A row is read from memory once; its gradient is computed from cache and written once.
#include <vector>

#include "cpu/launch.h"
#include "objective.h"

namespace {

bool labels_in_range(GrpoLossArgs& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    if (!a.mask[r] || (a.labels[r] >= 0 && a.labels[r] < a.vocab)) continue;
    a.bad_row = r;
    return false;
  }
  return true;
}

// Room for the exponentials of one row. An fp32 gradient that takes the place of its logits needs none.
template <typename T>
Kept room_for_kept(const GrpoLossArgs& a, int64_t r) {
  static thread_local std::vector<float> room;
  const int64_t blocks = a.vocab / kBlock + 1;
  const bool inside = sizeof(T) == 4 && a.dlogits.data == a.logits.data;
  const size_t size = blocks + (inside ? 0 : a.vocab);
  if (room.size() < size) room.resize(size);
  Kept kept;
  kept.m = room.data();
  kept.e = inside ? reinterpret_cast<float*>(row_at<T>(a.dlogits, r)) : room.data() + blocks;
  return kept;
}

template <typename T, bool CAP, bool STREAM>
void sweep_row(const GrpoLossArgs& a, int64_t r, const RowScale& scale, const T* next) {
  const T* p = row_at<T>(a.logits, r);
  const float z_label = Reader<T, CAP>(scale).scalar(p + a.labels[r]);
  const bool keep = !CAP && a.dlogits.data && a.objective.entropy_coef == 0.0f;
  Kept kept;
  RowSums sums;
  if (keep) {
    kept = room_for_kept<T>(a, r);
    sums = row_forward<T, false, true, true>(p, a.vocab, scale, next, &kept);
  } else {
    sums = row_forward<T, CAP, true, false>(p, a.vocab, scale, next, nullptr);
  }
  const RowValues row = row_values(sums, z_label, scale);

  const auto at = [r](const float* x) { return x ? x + r : nullptr; };
  const TokenObjective token = token_objective(a.objective, row.log_prob, token_ratio(row.log_prob, at(a.old_log_probs)),
                                               at(a.ref_log_probs), a.advantages ? a.advantages[r] : 1.0f);
  float* stats = a.stats + r;
  stats[kStatLogProb * a.rows] = row.log_prob;
  stats[kStatLse * a.rows] = row.lse;
  stats[kStatEntropy * a.rows] = float(row.entropy);
  write_stats(a.objective, token, float(row.entropy), a.weights[r], stats, a.rows);

  if (!a.dlogits.data) return;
  const double weight = a.weights[r] * scale.inv_temperature;
  const double g = weight * token.dlog_prob, k = weight * a.objective.entropy_coef;
  T* out = row_at<T>(a.dlogits, r);
  if (g == 0.0 && k == 0.0) {
    memset(out, 0, a.vocab * sizeof(T));
    return;
  }
  const RowGradient gradient(sums.m, sums.sum, row.entropy, g, k);
  if (keep) {
    kept_gradient<T, STREAM>(kept, out, a.vocab, a.labels[r], z_label, scale, gradient);
  } else if (k != 0.0) {
    row_gradient<T, CAP, true, STREAM>(p, out, a.vocab, a.labels[r], scale, gradient);
  } else {
    row_gradient<T, CAP, false, STREAM>(p, out, a.vocab, a.labels[r], scale, gradient);
  }
}

template <typename T>
int sweep(GrpoLossArgs& a, int num_threads) {
  if (!labels_in_range(a)) return kBadLabel;
  const RowScale scale{1.0 / a.temperature, float(a.softcap)};
  const bool fresh = a.dlogits.data && a.dlogits.data != a.logits.data;
  const bool stream = fresh && is_aligned<T>(a.dlogits);
  if (fresh) advise_huge_pages(a.dlogits.data, a.rows * a.vocab * int64_t(sizeof(T)));
  for_each_row(a.rows, a.vocab, num_threads, [&](int64_t r, int64_t next_row) {
    if (!a.mask[r]) {
      for (int s = 0; s < kGrpoStats; ++s) a.stats[s * a.rows + r] = 0.0f;
      if (a.dlogits.data) memset(row_at<T>(a.dlogits, r), 0, a.vocab * sizeof(T));
      return;
    }
    // the next row travels from memory while this one is computed
    const T* next = next_row >= 0 && a.mask[next_row] ? row_at<T>(a.logits, next_row) : nullptr;
    if (scale.softcap > 0.0f) {
      stream ? sweep_row<T, true, true>(a, r, scale, next) : sweep_row<T, true, false>(a, r, scale, next);
    } else {
      stream ? sweep_row<T, false, true>(a, r, scale, next) : sweep_row<T, false, false>(a, r, scale, next);
    }
  });
  return kOk;
}

}  // namespace

namespace regrpo::cpu::REGRPO_ISA {

int grpo_loss(GrpoLossArgs& args, int num_threads) { REGRPO_FOR_DTYPE(args.dtype, sweep, args, num_threads) }

}  // namespace regrpo::cpu::REGRPO_ISA
