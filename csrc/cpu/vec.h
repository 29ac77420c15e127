// A float vector for each instruction set: load from fp32, bf16 or fp16, store, and 2^y for y <= 0.
//
// This header is compiled several times with different flags into one module, so everything in it has internal
// linkage: an inline function shared between translation units could end up as the AVX-512 copy for all of them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

inline float bits_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t float_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, body = x.bits & 0x7fffu;
  if (body >= 0x7c00u) return bits_float(sign | 0x7f800000u | (body & 0x3ffu) << 13);  // inf, NaN
  // rebias by a multiplication, which also normalises subnormals
  return bits_float(sign | float_bits(bits_float(body << 13) * 0x1p112f));
}

inline void from_float(float f, float& out) { out = f; }
inline void from_float(float f, bf16& out) {  // to nearest even; NaN stays NaN
  const uint32_t u = float_bits(f);
  out.bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline void from_float(float f, fp16& out) {
  const uint32_t u = float_bits(f), sign = (u >> 16) & 0x8000u, body = u & 0x7fffffffu;
  uint32_t h;
  if (body > 0x7f800000u) {
    h = 0x7e00u;
  } else if (body >= 0x477ff000u) {  // rounds past 65504
    h = 0x7c00u;
  } else if (body < 0x38800000u) {  // subnormal: let the FPU round at the right place
    h = float_bits(bits_float(body) + 0.5f) - float_bits(0.5f);
  } else {
    h = (body + 0xc8000fffu + ((body >> 13) & 1u)) >> 13;
  }
  out.bits = uint16_t(sign | h);
}

// 2^f on [0, 1]: the minimax polynomial of degree 5 with p(0) = 1, relative error 8.3e-8 before rounding. The maximum
// of a row therefore counts as exactly 1, and a log-prob is never positive.
constexpr float kExp2[6] = {1.0f,           0.693151311808f,  0.240164450136f,
                            0.055799913146f, 0.00901703028444f, 0.00186713008191f};

#if defined(__AVX512F__)

struct Vec {
  static constexpr int64_t width = 16;
  __m512 v;
  static Vec fill(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static Vec load(const fp16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  __m256i round_bf16() const {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(r);
#endif
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16()); }
  void store(fp16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  // streaming stores: p aligned to the size of what is stored
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  void stream(bf16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), round_bf16()); }
  void stream(fp16* p) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float max() const { return _mm512_reduce_max_ps(v); }
};
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec exp2_nonpositive(Vec y) {
  const __m512 f = _mm512_reduce_ps(y.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(kExp2[5]);
  for (int i = 4; i >= 0; --i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2[i]));
  return {_mm512_scalef_ps(p, y.v)};  // scales by 2^floor(y); -inf gives 0
}
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec with_sign_of(Vec a, Vec sign) {  // a >= 0
  return {_mm512_or_ps(a.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.0f)))};
}
inline void store_fence() { _mm_sfence(); }

#elif defined(__AVX2__)

struct Vec {
  static constexpr int64_t width = 8;
  __m256 v;
  static Vec fill(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static Vec load(const fp16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  __m128i round_bf16() const {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round_bf16()); }
  void store(fp16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  void stream(bf16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), round_bf16()); }
  void stream(fp16* p) const {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  float max() const {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
};
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec exp2_nonpositive(Vec y) {
  const __m256 alive = _mm256_cmp_ps(y.v, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);  // NaN passes
  const __m256 n = _mm256_floor_ps(_mm256_and_ps(y.v, alive));
  const __m256 f = _mm256_sub_ps(_mm256_and_ps(y.v, alive), n);
  __m256 p = _mm256_set1_ps(kExp2[5]);
  for (int i = 4; i >= 0; --i) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2[i]));
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  return {_mm256_or_ps(_mm256_and_ps(p, alive), _mm256_cmp_ps(y.v, y.v, _CMP_UNORD_Q))};
}
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec with_sign_of(Vec a, Vec sign) {  // a >= 0
  return {_mm256_or_ps(a.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)))};
}
inline void store_fence() { _mm_sfence(); }

#else

struct Vec {  // plain loops that any compiler vectorises
  static constexpr int64_t width = 8;
  float v[8];
  template <typename F>
  static Vec make(F f) {
    Vec r;
    for (int i = 0; i < 8; ++i) r.v[i] = f(i);
    return r;
  }
  static Vec fill(float x) { return make([=](int) { return x; }); }
  template <typename T>
  static Vec load(const T* p) { return make([=](int i) { return to_float(p[i]); }); }
  template <typename T>
  void store(T* p) const { for (int i = 0; i < 8; ++i) from_float(v[i], p[i]); }
  template <typename T>
  void stream(T* p) const { store(p); }
  float sum() const { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
  float max() const {
    float m = v[0];
    for (int i = 1; i < 8; ++i) m = v[i] > m ? v[i] : m;
    return m;
  }
};
inline Vec operator+(Vec a, Vec b) { return Vec::make([&](int i) { return a.v[i] + b.v[i]; }); }
inline Vec operator-(Vec a, Vec b) { return Vec::make([&](int i) { return a.v[i] - b.v[i]; }); }
inline Vec operator*(Vec a, Vec b) { return Vec::make([&](int i) { return a.v[i] * b.v[i]; }); }
inline Vec operator/(Vec a, Vec b) { return Vec::make([&](int i) { return a.v[i] / b.v[i]; }); }
inline Vec fma(Vec a, Vec b, Vec c) { return Vec::make([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline Vec max(Vec a, Vec b) { return Vec::make([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline Vec exp2_nonpositive(Vec y) {
  return Vec::make([&](int i) {
    const float x = y.v[i] < -126.0f ? -126.0f : y.v[i];
    // truncation is floor after an offset; NaN is put back at the end
    const int n = int((x == x ? x : 0.0f) + 127.0f) - 127;
    const float f = x - float(n);
    float p = kExp2[5];
    for (int k = 4; k >= 0; --k) p = p * f + kExp2[k];
    const float r = bits_float(float_bits(p) + (uint32_t(n) << 23));
    return y.v[i] < -126.0f ? 0.0f : (y.v[i] == y.v[i] ? r : y.v[i]);
  });
}
inline Vec abs(Vec a) { return Vec::make([&](int i) { return fabsf(a.v[i]); }); }
inline Vec with_sign_of(Vec a, Vec sign) { return Vec::make([&](int i) { return copysignf(a.v[i], sign.v[i]); }); }
inline void store_fence() {}

#endif

}  // namespace
