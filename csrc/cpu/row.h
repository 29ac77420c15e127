// One vocabulary row: the forward pass (sum of exponentials, entropy moment) and the gradient pass.
//
// Both passes work on z, the logit after the softcap and before the temperature, relative to a reference close to the
// row's maximum: d = z - reference, e = exp(d / temperature). fp32 within a block, fp64 across blocks.
#pragma once
#include "cpu/vec.h"

namespace {

constexpr int64_t kBlock = 2048;      // elements whose sums are kept in fp32
constexpr float kFloor = -1e30f;      // for d: keeps 0 * -inf out of the entropy
constexpr float kRebase = 131072.0f;  // a block sum above this moves the reference up
constexpr double kLog2e = 1.4426950408889634;

struct RowScale {
  double inv_temperature;
  float softcap;  // 0: none
};

struct RowSums {
  float reference;
  double sum;     // of e
  double moment;  // of e * d
};

// Loads z. CAP: z = c tanh(x / c).
template <typename T, bool CAP>
struct Reader {
  Vec c, inv_c;
  explicit Reader(const RowScale& s) : c(Vec::fill(s.softcap)), inv_c(Vec::fill(CAP ? 1.0f / s.softcap : 0.0f)) {}
  Vec capped(Vec x) const {
    const Vec u = x * inv_c, one = Vec::fill(1.0f);
    const Vec t = Exp2<5>(1.0f)(abs(u) * Vec::fill(float(-2.0 * kLog2e)));
    return c * with_sign_of((one - t) / (one + t), u);
  }
  Pair operator()(const T* p) const {
    const Pair x = load_pair(p);
    return CAP ? Pair{capped(x.a), capped(x.b)} : x;
  }
  float scalar(const T* p) const {
    alignas(64) float lanes[Vec::width];
    const Vec x = Vec::fill(to_float(*p));
    (CAP ? capped(x) : x).store(lanes);
    return lanes[0];
  }
};

constexpr int64_t kStep = 2 * Vec::width;  // elements of a Pair

// The last, partial pair of a row, padded with its own last element; `live` is 1 in the real lanes.
template <typename T>
struct Tail {
  T data[kStep], flags[kStep];
  Tail(const T* p, int64_t n) {
    for (int64_t i = 0; i < kStep; ++i) {
      data[i] = p[i < n ? i : n - 1];
      from_float(i < n ? 1.0f : 0.0f, flags[i]);
    }
  }
  Pair live() const { return load_pair(flags); }
};

template <typename T, bool CAP>
float block_max(const T* p, int64_t n, const Reader<T, CAP>& z) {
  Vec m0 = Vec::fill(-INFINITY), m1 = m0;
  const auto take = [&](Pair x) {  // operands in this order ignore NaN, which the sum carries instead
    m0 = max(x.a, m0);
    m1 = max(x.b, m1);
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) take(z(p + i));
  if (i < n) take(z(Tail<T>(p + i, n - i).data));
  return max(m0, m1).max();
}

template <typename T, bool CAP, bool ENTROPY>
void block_sums(const T* p, int64_t n, const Reader<T, CAP>& z, const RowScale& scale, float reference, float* sum,
                float* moment) {
  const Vec s = Vec::fill(float(scale.inv_temperature * kLog2e)), m = Vec::fill(reference);
  const Vec floor = Vec::fill(kFloor), zero = Vec::fill(0.0f);
  const Exp2<5> exp2(1.0f);
  Vec sums[4] = {zero, zero, zero, zero}, moments[4] = {zero, zero, zero, zero};
  const auto add = [&](Vec x, int k) {
    Vec d = x - m;
    if (ENTROPY) d = max(floor, d);  // operands in this order let NaN through
    const Vec e = exp2(d * s);
    sums[k] = sums[k] + e;
    if (ENTROPY) moments[k] = fma(e, d, moments[k]);
  };
  int64_t i = 0;
  for (; i + 2 * kStep <= n; i += 2 * kStep) {
    const Pair x = z(p + i), y = z(p + i + kStep);
    add(x.a, 0);
    add(x.b, 1);
    add(y.a, 2);
    add(y.b, 3);
  }
  for (; i + kStep <= n; i += kStep) {
    const Pair x = z(p + i);
    add(x.a, 0);
    add(x.b, 1);
  }
  if (i < n) {
    const Tail<T> tail(p + i, n - i);
    const Pair x = z(tail.data), live = tail.live();
    const auto add_live = [&](Vec v, Vec flag, int k) {
      const Vec d = max(floor, v - m), e = exp2(d * s) * flag;
      sums[k] = sums[k] + e;
      if (ENTROPY) moments[k] = fma(e, d, moments[k]);
    };
    add_live(x.a, live.a, 2);
    add_live(x.b, live.b, 3);
  }
  *sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
  *moment = ENTROPY ? ((moments[0] + moments[1]) + (moments[2] + moments[3])).sum() : 0.0f;
}

// The reference is the first block's maximum, and moves only when a later block would lose precision: no pass of its
// own over the row, and no second one over a block, is spent on the maximum.
template <typename T, bool CAP, bool ENTROPY>
RowSums row_forward(const T* p, int64_t vocab, const RowScale& scale) {
  const Reader<T, CAP> z(scale);
  RowSums r{-INFINITY, 0.0, 0.0};
  const auto rebase = [&](float reference) {
    const double d = double(r.reference) - reference, shrink = exp(d * scale.inv_temperature);
    if (r.sum > 0.0) r.moment = shrink * (r.moment + d * r.sum);  // sum of e' d', d' = d + (old - new)
    r.sum *= shrink;
    r.reference = reference;
  };
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
    if (r.reference == -INFINITY) {
      r.reference = block_max(p + begin, n, z);
      if (r.reference == -INFINITY) {  // adds nothing, unless there is a NaN
        for (int64_t i = begin; i < begin + n; ++i)
          if (to_float(p[i]) != to_float(p[i])) r.sum = NAN;
        continue;
      }
    }
    float sum, moment;
    block_sums<T, CAP, ENTROPY>(p + begin, n, z, scale, r.reference, &sum, &moment);
    if (!(sum < kRebase)) {
      const float reference = block_max(p + begin, n, z);
      if (reference > r.reference) {
        rebase(reference);
        block_sums<T, CAP, ENTROPY>(p + begin, n, z, scale, reference, &sum, &moment);
      }
    }
    r.sum += sum;
    r.moment += moment;
  }
  return r;
}

// log_prob, lse and entropy from the sums.
struct RowValues {
  float log_prob, lse;
  double log_sum, entropy;
};
inline RowValues row_values(const RowSums& r, float z_label, const RowScale& scale) {
  RowValues v;
  v.log_sum = log(r.sum);
  const double log_prob = (double(z_label) - r.reference) * scale.inv_temperature - v.log_sum;
  v.log_prob = log_prob > 0.0 ? 0.0f : float(log_prob);  // rounding of the sum must not make a probability exceed 1
  v.lse = float(r.reference * scale.inv_temperature + v.log_sum);
  v.entropy = v.log_sum - scale.inv_temperature * r.moment / r.sum;
  if (v.entropy < 0.0) v.entropy = 0.0;
  return v;
}

// The gradient of a row: out = e * (b + a * d), plus `at_label` for the label. `a` is the entropy's part.
struct RowGradient {
  float reference;
  double a, b;
  double at_label;
};

template <typename T, bool CAP, bool ENTROPY, bool STREAM>
void row_gradient(const T* p, T* out, int64_t vocab, int64_t label, const RowScale& scale, const RowGradient& g,
                  const T* prefetch) {
  constexpr int kDegree = sizeof(T) == 4 || ENTROPY ? 5 : 4;
  constexpr int64_t kLine = 64 / sizeof(T);
  const Reader<T, CAP> z(scale);
  const Vec s = Vec::fill(float(scale.inv_temperature * kLog2e)), floor = Vec::fill(kFloor);
  const Vec m = Vec::fill(g.reference), a = Vec::fill(float(g.a)), b = Vec::fill(float(g.b));
  const Exp2<kDegree> exp2(ENTROPY ? 1.0f : float(g.b));
  const Vec inv_c = Vec::fill(CAP ? 1.0f / scale.softcap : 0.0f), one = Vec::fill(1.0f);
  const auto gradient = [&](Vec x) {
    Vec d = x - m;
    if (ENTROPY) d = max(floor, d);
    Vec v = exp2(d * s);
    if (ENTROPY) v = v * fma(a, d, b);
    if (CAP) {
      const Vec t = x * inv_c;
      v = v * (one - t * t);
    }
    return v;
  };
  const auto gradients = [&](const T* q) {
    const Pair x = z(q);
    return Pair{gradient(x.a), gradient(x.b)};
  };
  const auto put = [&](int64_t i) {
    const Pair x = gradients(p + i);
    if (STREAM) stream_pair(out + i, x); else store_pair(out + i, x);
  };
  // the label's own value in fp64, before out overwrites it
  const double z_label = z.scalar(p + label);
  const double d_label = z_label - g.reference < kFloor ? double(kFloor) : z_label - g.reference;
  double label_value = exp(d_label * scale.inv_temperature) * (g.b + g.a * d_label) + g.at_label;
  if (CAP) label_value *= 1.0 - z_label / scale.softcap * (z_label / scale.softcap);

  int64_t i = 0;
  for (; i + 2 * kStep <= vocab; i += 2 * kStep) {
    if (prefetch)
      for (int64_t k = 0; k < 2 * kStep; k += kLine) __builtin_prefetch(prefetch + i + k, 0, 2);
    put(i);
    put(i + kStep);
  }
  if (i + kStep <= vocab) {
    put(i);
    i += kStep;
  }
  if (i < vocab) {
    T lanes[kStep];
    store_pair(lanes, gradients(Tail<T>(p + i, vocab - i).data));
    for (int64_t k = i; k < vocab; ++k) out[k] = lanes[k - i];
  }
  if (STREAM) stream_fence();
  from_float(float(label_value), out[label]);
}

}  // namespace
