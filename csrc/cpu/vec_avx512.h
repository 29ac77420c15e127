// 16 lanes. Included by vec.h only.
#pragma once
#include <immintrin.h>

namespace {

struct Vec {
  static constexpr int64_t width = 16;
  static constexpr bool fused = true;  // fma rounds once
  __m512 v;
  static Vec fill(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float max() const { return _mm512_reduce_max_ps(v); }
};
struct Pair { Vec a, b; };

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec with_sign_of(Vec a, Vec sign) {  // a >= 0
  return {_mm512_or_ps(a.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.0f)))};
}

template <int DEGREE>
Vec exp2_polynomial(Vec y, const Vec* c) {
  const __m512 f = _mm512_reduce_ps(y.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = c[DEGREE].v;
  for (int i = DEGREE - 1; i >= 0; --i) p = _mm512_fmadd_ps(p, f, c[i].v);
  return {_mm512_scalef_ps(p, y.v)};  // times 2^floor(y); -inf gives 0
}

inline Pair load_pair(const float* p) { return {Vec::load(p), Vec::load(p + 16)}; }
inline Pair load_pair(const bf16* p) {
  const __m512i x = _mm512_loadu_si512(p);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000u))))}};
}
inline Pair load_pair(const fp16* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {{_mm512_cvtph_ps(_mm256_loadu_si256(q))}, {_mm512_cvtph_ps(_mm256_loadu_si256(q + 1))}};
}

inline __m512i pack(Pair x, const bf16*) {
#if defined(__AVX512BF16__)
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(x.b.v, x.a.v);  // [a 0..15, b 0..15]
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleave, halves);
#else
  const auto rounded = [](__m512 v) {  // to nearest even, in the upper half of each lane
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  };
  const __m512i high = _mm512_and_si512(rounded(x.b.v), _mm512_set1_epi32(int(0xffff0000u)));
  return _mm512_or_si512(_mm512_srli_epi32(rounded(x.a.v), 16), high);
#endif
}
inline __m512i pack(Pair x, const fp16*) {
  const __m256i a = _mm512_cvtps_ph(x.a.v, _MM_FROUND_TO_NEAREST_INT);
  const __m256i b = _mm512_cvtps_ph(x.b.v, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

inline void store_pair(float* p, Pair x) {
  x.a.store(p);
  x.b.store(p + 16);
}
template <typename T>
void store_pair(T* p, Pair x) { _mm512_storeu_si512(p, pack(x, p)); }

// Streaming stores bypass the caches; p is aligned to 64 bytes.
inline void stream_pair(float* p, Pair x) {
  _mm512_stream_ps(p, x.a.v);
  _mm512_stream_ps(p + 16, x.b.v);
}
template <typename T>
void stream_pair(T* p, Pair x) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), pack(x, p)); }
inline void stream_fence() { _mm_sfence(); }

}  // namespace
