// One vocabulary row: the forward pass (max, sum of exponentials, entropy moment) and the gradient pass.
//
// Both passes work on z, the logit after the softcap and before the temperature. Everything is relative to the row's
// maximum m: d = z - m, e = exp(d / temperature). fp32 within a block, fp64 across blocks.
#pragma once
#include "cpu/vec.h"

namespace {

constexpr int64_t kBlock = 2048;       // elements; its second read, after the block's maximum, comes from L1
constexpr float kFloor = -1e30f;       // for d: keeps 0 * -inf out of the entropy
constexpr double kLog2e = 1.4426950408889634;

struct RowScale {
  double inv_temperature;
  float softcap;  // 0: none
};

struct RowSums {
  float max;      // m
  double sum;     // sum of e
  double moment;  // sum of e * d
};

// Loads z. CAP: z = c tanh(x / c).
template <typename T, bool CAP>
struct Reader {
  const T* p;
  Vec c, inv_c;
  Reader(const T* p, const RowScale& s) : p(p), c(Vec::fill(s.softcap)), inv_c(Vec::fill(CAP ? 1.0f / s.softcap : 0.0f)) {}
  Vec capped(Vec x) const {
    const Vec u = x * inv_c, one = Vec::fill(1.0f);
    const Vec t = exp2_nonpositive(abs(u) * Vec::fill(float(-2.0 * kLog2e)));
    return c * with_sign_of((one - t) / (one + t), u);
  }
  Vec at(const T* q) const { return CAP ? capped(Vec::load(q)) : Vec::load(q); }
  Vec operator[](int64_t i) const { return at(p + i); }
  float scalar(int64_t i) const {
    alignas(64) float lanes[Vec::width];
    const Vec x = Vec::fill(to_float(p[i]));
    (CAP ? capped(x) : x).store(lanes);
    return lanes[0];
  }
};

// The last, partial vector of a row, padded with its own last element; `live` is 1 in the real lanes.
template <typename T>
struct Tail {
  T data[Vec::width];
  float lanes[Vec::width];
  Tail(const T* p, int64_t n) {
    for (int64_t i = 0; i < Vec::width; ++i) {
      data[i] = p[i < n ? i : n - 1];
      lanes[i] = i < n ? 1.0f : 0.0f;
    }
  }
  Vec live() const { return Vec::load(lanes); }
};

template <typename T, bool CAP, bool ENTROPY>
RowSums row_forward(const T* p, int64_t vocab, const RowScale& scale) {
  constexpr int64_t W = Vec::width;
  const Reader<T, CAP> z(p, scale);
  const Vec s = Vec::fill(float(scale.inv_temperature * kLog2e)), floor = Vec::fill(kFloor);
  RowSums r{-INFINITY, 0.0, 0.0};

  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    const int64_t full = begin + (end - begin) / W * W;
    const Tail<T> tail(p + (full < end ? full : begin), full < end ? end - full : W);
    Vec m0 = Vec::fill(-INFINITY), m1 = m0, m2 = m0, m3 = m0;
    int64_t i = begin;
    for (; i + 4 * W <= full; i += 4 * W) {
      m0 = max(m0, z[i]);
      m1 = max(m1, z[i + W]);
      m2 = max(m2, z[i + 2 * W]);
      m3 = max(m3, z[i + 3 * W]);
    }
    for (; i < full; i += W) m0 = max(m0, z[i]);
    if (full < end) m1 = max(m1, z.at(tail.data));
    const float block_max = max(max(m0, m1), max(m2, m3)).max();
    if (block_max > r.max) {
      const double d = double(r.max) - block_max, shrink = exp(d * scale.inv_temperature);
      // sum of e' d' with d' = d + (old max - new max)
      if (r.sum > 0.0) r.moment = shrink * (r.moment + d * r.sum);
      r.sum *= shrink;
      r.max = block_max;
    }
    if (r.max == -INFINITY && block_max == r.max) {
      bool nan = false;  // a block of -inf adds nothing, but NaN must come through
      for (int64_t k = begin; k < end; ++k) nan |= to_float(p[k]) != to_float(p[k]);
      if (nan) r.sum = NAN;
      continue;
    }

    const Vec m = Vec::fill(r.max);
    Vec sums[4], moments[4];
    for (int k = 0; k < 4; ++k) sums[k] = moments[k] = Vec::fill(0.0f);
    const auto add = [&](Vec x, int k) {
      Vec d = x - m;
      if (ENTROPY) d = max(floor, d);  // operands in this order let NaN through
      const Vec e = exp2_nonpositive(d * s);
      sums[k] = sums[k] + e;
      if (ENTROPY) moments[k] = fma(e, d, moments[k]);
    };
    for (i = begin; i + 4 * W <= full; i += 4 * W) {
      add(z[i], 0);
      add(z[i + W], 1);
      add(z[i + 2 * W], 2);
      add(z[i + 3 * W], 3);
    }
    for (; i < full; i += W) add(z[i], 0);
    if (full < end) {
      Vec d = max(floor, z.at(tail.data) - m);
      const Vec e = exp2_nonpositive(d * s) * tail.live();
      sums[1] = sums[1] + e;
      if (ENTROPY) moments[1] = fma(e, d, moments[1]);
    }
    r.sum += ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
    if (ENTROPY) r.moment += ((moments[0] + moments[1]) + (moments[2] + moments[3])).sum();
  }
  return r;
}

// The gradient of a row: out = e * (b + a * d), plus `at_label` for the label. `a` is the entropy's part.
struct RowGradient {
  float max;  // the reference that d is relative to
  double a, b;
  double at_label;
};

template <typename T, bool CAP, bool ENTROPY, bool STREAM>
void row_gradient(const T* p, T* out, int64_t vocab, int64_t label, const RowScale& scale, const RowGradient& g,
                  const T* prefetch) {
  constexpr int64_t W = Vec::width;
  constexpr int64_t kLine = 64 / sizeof(T);
  const Reader<T, CAP> z(p, scale);
  const Vec s = Vec::fill(float(scale.inv_temperature * kLog2e)), floor = Vec::fill(kFloor);
  const Vec m = Vec::fill(g.max), a = Vec::fill(float(g.a)), b = Vec::fill(float(g.b));
  const float inv_c = CAP ? 1.0f / scale.softcap : 0.0f;
  const auto gradient = [&](Vec x) {
    Vec d = x - m;
    if (ENTROPY) d = max(floor, d);
    Vec v = exp2_nonpositive(d * s) * (ENTROPY ? fma(a, d, b) : b);
    if (CAP) {
      const Vec t = x * Vec::fill(inv_c);
      v = v * (Vec::fill(1.0f) - t * t);
    }
    return v;
  };
  // the label's own value in fp64, before out overwrites it
  const float z_label = z.scalar(label);
  double d_label = double(z_label) - g.max;
  if (d_label < kFloor) d_label = kFloor;
  double label_value = exp(d_label * scale.inv_temperature) * (g.b + g.a * d_label) + g.at_label;
  if (CAP) label_value *= 1.0 - double(z_label) * inv_c * (double(z_label) * inv_c);

  const int64_t full = vocab / W * W;
  const auto put = [&](int64_t i) {
    const Vec v = gradient(z[i]);
    if (STREAM) v.stream(out + i); else v.store(out + i);
  };
  int64_t i = 0;
  for (; i + 4 * W <= full; i += 4 * W) {
    if (prefetch)
      for (int64_t k = 0; k < 4 * W; k += kLine) __builtin_prefetch(prefetch + i + k, 0, 2);
    put(i);
    put(i + W);
    put(i + 2 * W);
    put(i + 3 * W);
  }
  for (; i < full; i += W) put(i);
  if (full < vocab) {
    const Tail<T> tail(p + full, vocab - full);
    T lanes[W];
    gradient(z.at(tail.data)).store(lanes);
    for (i = full; i < vocab; ++i) out[i] = lanes[i - full];
  }
  if (STREAM) store_fence();
  from_float(float(label_value), out[label]);
}

}  // namespace
