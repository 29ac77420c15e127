// 8 lanes. Included by vec.h only.
#pragma once
#include <immintrin.h>

namespace {

struct Vec {
  static constexpr int64_t width = 8;
  static constexpr bool fused = true;  // fma rounds once
  __m256 v;
  static Vec fill(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
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
struct Pair { Vec a, b; };

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec with_sign_of(Vec a, Vec sign) {  // a >= 0
  return {_mm256_or_ps(a.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)))};
}

template <int DEGREE>
Vec exp2_polynomial(Vec y, const Vec* c) {
  // below 2^-126 the result is 0; NaN is kept by the order of the operands
  const __m256 alive = _mm256_cmp_ps(y.v, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m256 x = _mm256_max_ps(_mm256_set1_ps(-126.0f), _mm256_min_ps(_mm256_set1_ps(126.0f), y.v));
  const __m256 n = _mm256_floor_ps(x), f = _mm256_sub_ps(x, n);
  __m256 p = c[DEGREE].v;
  for (int i = DEGREE - 1; i >= 0; --i) p = _mm256_fmadd_ps(p, f, c[i].v);
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return {_mm256_and_ps(alive, _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))))};
}

inline Pair load_pair(const float* p) { return {Vec::load(p), Vec::load(p + 8)}; }
inline Pair load_pair(const bf16* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000u))))}};
}
inline Pair load_pair(const fp16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {{_mm256_cvtph_ps(_mm_loadu_si128(q))}, {_mm256_cvtph_ps(_mm_loadu_si128(q + 1))}};
}

inline __m256i pack(Pair x, const bf16*) {
  const auto rounded = [](__m256 v) {  // to nearest even, in the upper half of each lane
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000), nan);
  };
  const __m256i high = _mm256_and_si256(rounded(x.b.v), _mm256_set1_epi32(int(0xffff0000u)));
  return _mm256_or_si256(_mm256_srli_epi32(rounded(x.a.v), 16), high);
}
inline __m256i pack(Pair x, const fp16*) {
  const __m128i a = _mm256_cvtps_ph(x.a.v, _MM_FROUND_TO_NEAREST_INT);
  const __m128i b = _mm256_cvtps_ph(x.b.v, _MM_FROUND_TO_NEAREST_INT);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
}

inline void store_pair(float* p, Pair x) {
  x.a.store(p);
  x.b.store(p + 8);
}
template <typename T>
void store_pair(T* p, Pair x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack(x, p)); }

// Streaming stores bypass the caches; p is aligned to 32 bytes.
inline void stream_pair(float* p, Pair x) {
  _mm256_stream_ps(p, x.a.v);
  _mm256_stream_ps(p + 8, x.b.v);
}
template <typename T>
void stream_pair(T* p, Pair x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), pack(x, p)); }
inline void stream_fence() { _mm_sfence(); }

}  // namespace
