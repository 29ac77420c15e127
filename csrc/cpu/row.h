// One vocabulary row: the forward pass (sum of exponentials, entropy moment) and the gradient pass.
//
// Both passes work on z, the logit after the softcap and before the temperature, and take its exponential as e = 2^y with
// y = (z - reference) / temperature / ln 2 and a reference close to the row's maximum. fp32 within a block, fp64 across.
#pragma once
#include "cpu/vec.h"

namespace {

constexpr int64_t kBlock = 2048;      // elements whose sums are kept in fp32
constexpr float kFloor = -1e4f;       // for y, where 2^y is 0: keeps 0 * -inf out of the entropy
constexpr float kRebase = 131072.0f;  // a block sum above this moves the reference up
constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

struct RowScale {
  double inv_temperature;
  float softcap;  // 0: none
};

// y from z. With a fused multiply-add the reference is not m itself but what m * scale rounds to, so that the product
// needs no rounding of its own; far from 0, where that is too far from m, the difference comes first.
struct Exponent {
  bool fused;
  float scale;
  double reference;
  Vec factor, m, offset;
  Exponent(const RowScale& s, float m)
      : scale(float(s.inv_temperature * kLog2e)), factor(Vec::fill(scale)), m(Vec::fill(m)),
        offset(Vec::fill(-(m * scale))) {
    fused = Vec::fused && std::fabs(m * scale) < 1048576.0f;
    reference = fused ? double(m * scale) / scale : double(m);
  }
  Vec operator()(Vec z) const { return fused ? fma(z, factor, offset) : (z - m) * factor; }
};

struct RowSums {
  float m;        // of the Exponent
  double sum;     // of e
  double moment;  // of e * y
};

// The exponentials of a row, kept by the forward pass for the gradient: a multiplication is cheaper than a second
// exponential. `e` may be an fp32 row itself.
struct Kept {
  float* e;
  float* m;  // of each block's Exponent
  float tail[32];
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

template <typename T, bool CAP, bool ENTROPY, bool KEEP>
void block_sums(const T* p, int64_t n, const Reader<T, CAP>& z, const Exponent& exponent, const T* prefetch, float* kept,
                float* tail, float* sum, float* moment) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const Vec floor = Vec::fill(kFloor), zero = Vec::fill(0.0f);
  const Exp2<5> exp2(1.0f);
  Vec sums[4] = {zero, zero, zero, zero}, moments[4] = {zero, zero, zero, zero};
  const auto add = [&](Vec x, int k, float* keep) {
    Vec y = exponent(x);
    if (ENTROPY) y = max(floor, y);  // operands in this order let NaN through
    const Vec e = exp2(y);
    if (KEEP) e.store(keep);
    sums[k] = sums[k] + e;
    if (ENTROPY) moments[k] = fma(e, y, moments[k]);
  };
  int64_t i = 0;
  for (; i + 2 * kStep <= n; i += 2 * kStep) {
    if (prefetch)
      for (int64_t k = 0; k < 2 * kStep; k += kLine) __builtin_prefetch(prefetch + i + k, 0, 2);
    const Pair x = z(p + i), y = z(p + i + kStep);
    add(x.a, 0, kept + i);
    add(x.b, 1, kept + i + Vec::width);
    add(y.a, 2, kept + i + kStep);
    add(y.b, 3, kept + i + kStep + Vec::width);
  }
  for (; i + kStep <= n; i += kStep) {
    const Pair x = z(p + i);
    add(x.a, 0, kept + i);
    add(x.b, 1, kept + i + Vec::width);
  }
  if (i < n) {
    const Tail<T> last(p + i, n - i);
    const Pair x = z(last.data), live = last.live();
    const auto add_live = [&](Vec v, Vec flag, int k, float* keep) {
      const Vec y = max(floor, exponent(v)), e = exp2(y) * flag;
      if (KEEP) e.store(keep);
      sums[k] = sums[k] + e;
      if (ENTROPY) moments[k] = fma(e, y, moments[k]);
    };
    add_live(x.a, live.a, 2, tail);
    add_live(x.b, live.b, 3, tail + Vec::width);
  }
  *sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
  *moment = ENTROPY ? ((moments[0] + moments[1]) + (moments[2] + moments[3])).sum() : 0.0f;
}

// The reference is the first block's maximum, and moves only when a later block would lose precision: no pass of its
// own over the row, and no second one over a block, is spent on the maximum. `prefetch`, a row that comes next or null,
// travels from memory meanwhile.
template <typename T, bool CAP, bool ENTROPY, bool KEEP>
RowSums row_forward(const T* p, int64_t vocab, const RowScale& scale, const T* prefetch, Kept* kept) {
  const Reader<T, CAP> z(scale);
  RowSums r{-INFINITY, 0.0, 0.0};
  const bool overwrites = KEEP && static_cast<const void*>(kept->e) == p;
  const auto rebase = [&](float m) {
    const double shift = (Exponent(scale, r.m).reference - Exponent(scale, m).reference) * scale.inv_temperature;
    const double shrink = exp(shift);
    if (r.sum > 0.0) r.moment = shrink * (r.moment + shift * kLog2e * r.sum);  // y' = y + shift / ln 2
    r.sum *= shrink;
    r.m = m;
  };
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
    if (r.m == -INFINITY) {
      r.m = block_max(p + begin, n, z);
      if (r.m == -INFINITY) {  // adds nothing, unless there is a NaN
        for (int64_t i = begin; i < begin + n; ++i)
          if (to_float(p[i]) != to_float(p[i])) r.sum = NAN;
        if (KEEP) {
          for (int64_t i = begin; i < begin + n - n % kStep; ++i) kept->e[i] = 0.0f;
          for (float& e : kept->tail) e = 0.0f;
          kept->m[begin / kBlock] = 0.0f;
        }
        continue;
      }
    } else if (overwrites) {  // what a block held is gone once its exponentials are there
      const float m = block_max(p + begin, n, z);
      if ((m - r.m) * scale.inv_temperature > 8.0) rebase(m);
    }
    float* keep = KEEP ? kept->e + begin : nullptr;
    float* tail = KEEP ? kept->tail : nullptr;
    const T* ahead = prefetch ? prefetch + begin : nullptr;
    float sum, moment;
    block_sums<T, CAP, ENTROPY, KEEP>(p + begin, n, z, Exponent(scale, r.m), ahead, keep, tail, &sum, &moment);
    if (!(sum < kRebase) && !overwrites) {
      const float m = block_max(p + begin, n, z);
      if (m > r.m) {
        rebase(m);
        block_sums<T, CAP, ENTROPY, KEEP>(p + begin, n, z, Exponent(scale, m), nullptr, keep, tail, &sum, &moment);
      }
    }
    if (KEEP) kept->m[begin / kBlock] = r.m;
    r.sum += sum;
    r.moment += moment;
  }
  return r;
}

// log_prob, lse and entropy from the sums.
struct RowValues {
  float log_prob, lse;
  double entropy;
};
inline RowValues row_values(const RowSums& r, float z_label, const RowScale& scale) {
  RowValues v;
  const double reference = Exponent(scale, r.m).reference;
  const double log_sum = log(r.sum);
  const double log_prob = (double(z_label) - reference) * scale.inv_temperature - log_sum;
  v.log_prob = log_prob > 0.0 ? 0.0f : float(log_prob);  // rounding of the sum must not make a probability exceed 1
  v.lse = float(reference * scale.inv_temperature + log_sum);
  v.entropy = log_sum - kLn2 * r.moment / r.sum;
  if (v.entropy < 0.0) v.entropy = 0.0;
  return v;
}

// The gradient of a row: out = e * (b + a * y), plus `at_label` for the label. `a` is the entropy's part.
struct RowGradient {
  float m;  // of the Exponent
  double a, b;
  double at_label;
  // Of g log_prob - k entropy, where `sum` belongs to `m`.
  RowGradient(float m, double sum, double entropy, double g, double k)
      : m(m), a(k * kLn2 / sum), b((k * (entropy - log(sum)) - g) / sum), at_label(g) {}
};

template <bool CAP>
double label_gradient(float z_label, const RowScale& scale, const RowGradient& g) {
  // with the bits that went into the sum, so that a label of probability 1 has no gradient
  alignas(64) float y[Vec::width], e[Vec::width];
  max(Vec::fill(kFloor), Exponent(scale, g.m)(Vec::fill(z_label))).store(y);
  Exp2<5>(1.0f)(Vec::load(y)).store(e);
  const double v = double(e[0]) * (g.b + g.a * y[0]) + g.at_label;
  return CAP ? v * (1.0 - z_label / scale.softcap * (z_label / scale.softcap)) : v;
}

template <typename T, bool CAP, bool ENTROPY, bool STREAM>
void row_gradient(const T* p, T* out, int64_t vocab, int64_t label, const RowScale& scale, const RowGradient& g) {
  constexpr int kDegree = sizeof(T) == 4 || ENTROPY ? 5 : 4;
  const Reader<T, CAP> z(scale);
  const Exponent exponent(scale, g.m);
  const Vec floor = Vec::fill(kFloor), a = Vec::fill(float(g.a)), b = Vec::fill(float(g.b));
  const Exp2<kDegree> exp2(ENTROPY ? 1.0f : float(g.b));
  const Vec inv_c = Vec::fill(CAP ? 1.0f / scale.softcap : 0.0f), one = Vec::fill(1.0f);
  const auto gradient = [&](Vec x) {
    Vec y = exponent(x);
    if (ENTROPY) y = max(floor, y);
    Vec v = exp2(y);
    if (ENTROPY) v = v * fma(a, y, b);
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
  // before out overwrites the label's logit
  const double label_value = label_gradient<CAP>(z.scalar(p + label), scale, g);
  int64_t i = 0;
  for (; i + kStep <= vocab; i += kStep) {
    const Pair x = gradients(p + i);
    if (STREAM) stream_pair(out + i, x); else store_pair(out + i, x);
  }
  if (i < vocab) {
    T lanes[kStep];
    store_pair(lanes, gradients(Tail<T>(p + i, vocab - i).data));
    for (int64_t k = i; k < vocab; ++k) out[k] = lanes[k - i];
  }
  if (STREAM) stream_fence();
  from_float(float(label_value), out[label]);
}

// The same from the exponentials that the forward pass kept, without softcap and entropy.
template <typename T, bool STREAM>
void kept_gradient(const Kept& kept, T* out, int64_t vocab, int64_t label, float z_label, const RowScale& scale,
                   const RowGradient& g) {
  const double reference = Exponent(scale, g.m).reference;
  Vec b = Vec::fill(0.0f);
  int64_t i = 0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const float m = kept.m[begin / kBlock];
    const double shift = (Exponent(scale, m).reference - reference) * scale.inv_temperature;
    b = Vec::fill(float(g.b * exp(shift)));
    const int64_t end = vocab - begin < kBlock ? vocab - kStep : begin + kBlock - kStep;
    for (; i <= end; i += kStep) {
      const Pair x{Vec::load(kept.e + i) * b, Vec::load(kept.e + i + Vec::width) * b};
      if (STREAM) stream_pair(out + i, x); else store_pair(out + i, x);
    }
  }
  if (i < vocab) {
    T lanes[kStep];
    store_pair(lanes, Pair{Vec::load(kept.tail) * b, Vec::load(kept.tail + Vec::width) * b});
    for (int64_t k = i; k < vocab; ++k) out[k] = lanes[k - i];
  }
  if (STREAM) stream_fence();
  from_float(float(label_gradient<false>(z_label, scale, g)), out[label]);
}

}  // namespace
