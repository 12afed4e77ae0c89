// 2^x and log2(x) of a vector of floats: both polynomials and their error bounds.
//
// exp2: x = n + f, n the nearest integer. On [-½, ½] a polynomial of degree 5 (minimax) is off from 2^f by at most
// 9.1e-8 of its value, and exactly 1 at 0; the rounding of fp32 makes that kExp2Error. 2^n goes into the exponent. The
// error has to vanish at 0, because a confident token has one q next to 1 and its gradient is a small difference from
// that. log2: x = 2^e·(1 + f), 1 + f in [√½, √2). log2(1 + f) is f·P(f), P of degree 8, off by at most 2.6e-8 of its
// value. A lower degree would show in a sum over a vocabulary, where roundings average out and the polynomial's error
// does not. A test checks both bounds.
#pragma once

#include "lanes.h"

namespace adakd {
namespace ADAKD_ISA {

// Largest relative errors, with the rounding of fp32. They are those of the portable build, which has no fused
// multiply-adds; with these the errors are smaller.
constexpr float kExp2Error = 2.0e-7f;
constexpr float kLog2Error = 2.5e-7f;

// Horner's rule, the highest coefficient first.
template <int n> ADAKD_INLINE Floats polynomial(Floats x, const float (&coefficient)[n]) {
  Floats y = broadcast<Floats>(coefficient[0]);
  for (int i = 1; i < n; ++i) y = fma(y, x, broadcast<Floats>(coefficient[i]));
  return y;
}

constexpr float kExp2[] = {1.3264727080119429e-3f, 9.671512862186355e-3f, 5.550733745645813e-2f,
                           2.4022242081843165e-1f, 6.931469775965886e-1f, 1.0f};
constexpr float kLog2[] = {0.12583704f,  -0.20726982f, 0.21571563f,  -0.23894481f, 0.28791624f,
                           -0.36070368f, 0.48091063f,  -0.72134733f, 1.44269502f};

ADAKD_INLINE Floats exp2(Floats x) {
#if defined(ADAKD_AVX512)
  const Floats f = _mm512_reduce_ps(x, 0);  // x - n, and 0 for an infinite x
  return _mm512_scalef_ps(polynomial(f, kExp2), x - f);  // times 2^n, 0 where n is far below the exponent's range
#else
  x = max(broadcast<Floats>(-127.0f), x);  // at -127 the exponent field comes out as 0, and so does the number
#if defined(__AVX2__)
  const Floats n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // Next to 1.5·2^23 neighbouring floats are 1 apart, so that the first sum rounds to an integer.
  const Floats shift = broadcast<Floats>(0x1.8p23f), n = (x + shift) - shift;
#endif
  // Added to the exponent field, n multiplies by 2^n.
  const Ints exponent = __builtin_convertvector(n, Ints);
  return (Floats)((Uints)polynomial(x - n, kExp2) + ((Uints)exponent << 23));
#endif
}

ADAKD_INLINE Floats log2(Floats x) {
  // The bits of √½: the exponent field of the difference counts octaves from √½ on, so that 1 + f ends up in [√½, √2).
  constexpr uint32_t kRootOfHalf = 0x3f3504f3;
  const Ints exponent = (Ints)((Uints)x - kRootOfHalf) >> 23;
  const Floats mantissa = (Floats)((Uints)x - ((Uints)exponent << 23));
  const Floats f = mantissa - 1.0f;
  return fma(f, polynomial(f, kLog2), __builtin_convertvector(exponent, Floats));
}

}  // namespace ADAKD_ISA
}  // namespace adakd
