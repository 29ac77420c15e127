// 8 lanes in plain loops, which any compiler turns into the vectors it has. Included by vec.h only.
#pragma once

namespace {

struct Vec {
  static constexpr int64_t width = 8;
  static constexpr bool fused = false;  // fma rounds once
  float v[8];
  template <typename F>
  static Vec make(F f) {
    Vec r;
    for (int i = 0; i < 8; ++i) r.v[i] = f(i);
    return r;
  }
  static Vec fill(float x) { return make([=](int) { return x; }); }
  static Vec load(const float* p) { return make([=](int i) { return p[i]; }); }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
  float sum() const { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
  float max() const {
    float m = v[0];
    for (int i = 1; i < 8; ++i) m = v[i] > m ? v[i] : m;
    return m;
  }
};
struct Pair { Vec a, b; };

inline Vec operator+(Vec a, Vec b) { return Vec::make([&](int i) { return a.v[i] + b.v[i]; }); }
inline Vec operator-(Vec a, Vec b) { return Vec::make([&](int i) { return a.v[i] - b.v[i]; }); }
inline Vec operator*(Vec a, Vec b) { return Vec::make([&](int i) { return a.v[i] * b.v[i]; }); }
inline Vec operator/(Vec a, Vec b) { return Vec::make([&](int i) { return a.v[i] / b.v[i]; }); }
inline Vec fma(Vec a, Vec b, Vec c) { return Vec::make([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline Vec max(Vec a, Vec b) { return Vec::make([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline Vec abs(Vec a) { return Vec::make([&](int i) { return fabsf(a.v[i]); }); }
inline Vec with_sign_of(Vec a, Vec sign) { return Vec::make([&](int i) { return copysignf(a.v[i], sign.v[i]); }); }

template <int DEGREE>
Vec exp2_polynomial(Vec y, const Vec* c) {
  return Vec::make([&](int i) {
    float x = y.v[i] < 126.0f ? y.v[i] : 126.0f;  // NaN too, put back below
    x = x > -126.0f ? x : -126.0f;
    const int n = int(x + 127.0f) - 127;  // floor, up to rounding near an integer
    const float f = x - float(n);
    float p = c[DEGREE].v[i];
    for (int k = DEGREE - 1; k >= 0; --k) p = p * f + c[k].v[i];
    const float r = p * bits_float(uint32_t(n + 127) << 23);
    return y.v[i] < -126.0f ? 0.0f : (y.v[i] == y.v[i] ? r : y.v[i]);
  });
}

template <typename T>
Pair load_pair(const T* p) {
  return {Vec::make([=](int i) { return to_float(p[i]); }), Vec::make([=](int i) { return to_float(p[i + 8]); })};
}
template <typename T>
void store_pair(T* p, Pair x) {
  for (int i = 0; i < 8; ++i) from_float(x.a.v[i], p[i]);
  for (int i = 0; i < 8; ++i) from_float(x.b.v[i], p[i + 8]);
}
template <typename T>
void stream_pair(T* p, Pair x) { store_pair(p, x); }
inline void stream_fence() {}

}  // namespace
