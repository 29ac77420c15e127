#pragma once
#include "cuda_runtime.h"
struct __half { uint16_t bits; };
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                          : exponent     ? ldexpf(1024 + fraction, exponent - 25)
                                         : ldexpf(fraction, -24);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = signbit(x) ? 0x8000 : 0;
  if (x != x) return {0x7fff};
  const float magnitude = fabsf(x);
  if (magnitude == 0.0f) return {sign};
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  int exponent;
  frexpf(magnitude, &exponent);
  const int step = exponent - 11 < -24 ? -24 : exponent - 11;  // of the last place; subnormals share one
  const int units = int(nearbyintf(ldexpf(magnitude, -step)));
  // a carry out of the fraction moves on into the exponent
  return {uint16_t(sign | (units + (step + 24) * 1024))};
}
