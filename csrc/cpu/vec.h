// A float vector for each instruction set: arithmetic, 2^y, and loads and stores of fp32, bf16 and fp16.
//
// Elements are loaded and stored two vectors at a time. Which lane of a Pair holds which element is up to the type, as
// long as store_pair undoes load_pair: 16-bit types come as their even and odd elements, which costs one shift and one
// mask instead of a widening shuffle for each vector.
//
// This header is compiled several times with different flags into one module, so everything in it has internal
// linkage: an inline function shared between translation units could end up as the AVX-512 copy for all of them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>


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

// 2^f on [0, 1]: minimax polynomials with p(0) = 1. Degree 5 has a relative error of 8.3e-8 before rounding; degree 4
// has 2.9e-6, far below the rounding of a 16-bit output.
constexpr float kExp2Degree5[6] = {1.0f,            0.693151311808f,   0.240164450136f,
                                   0.055799913146f, 0.00901703028444f, 0.00186713008191f};
constexpr float kExp2Degree4[5] = {1.0f, 0.693044844908f, 0.241280204723f, 0.0522424742691f, 0.0134266842506f};

}  // namespace

#if defined(__AVX512F__)
#include "cpu/vec_avx512.h"
#elif defined(__AVX2__)
#include "cpu/vec_avx2.h"
#else
#include "cpu/vec_portable.h"
#endif

namespace {

// scale * 2^y, the scale folded into the coefficients.
template <int DEGREE>
struct Exp2 {
  Vec c[DEGREE + 1];
  explicit Exp2(float scale) {
    for (int i = 0; i <= DEGREE; ++i) c[i] = Vec::fill(scale * (DEGREE == 4 ? kExp2Degree4[i % 5] : kExp2Degree5[i]));
  }
  Vec operator()(Vec y) const { return exp2_polynomial<DEGREE>(y, c); }
};

}  // namespace
