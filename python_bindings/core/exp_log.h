// 2^x and log2(x) of a vector of floats: both polynomials and their error bounds.
//
// exp2: x = n + f, n the nearest integer. On [-½, ½] a polynomial of degree 5 (minimax) is off from 2^f by at most
// 9.1e-8 of its value, and exactly 1 at 0; the rounding of fp32 makes that kExp2Error. 2^n goes into the exponent. The
// error has to vanish at 0, because a confident token has one q next to 1 and its gradient is a small difference from
// that. mass_of is 2^x too, but its error does not vanish at 0: with AVX-512, n is there the integer below x, which the
// instruction that scales by 2^n takes by itself. That polynomial is exact at 0 and 1, and off by at most 9.3e-8
// between. log2: x = 2^e·(1 + f), 1 + f in [¾, 1½). log2(1 + f) is f·P(f), P of degree 8, off by at most 3.6e-8 of its
// value. A lower degree would show in a sum over a vocabulary, where roundings average out and the polynomial's error
// does not. A test checks both bounds.
//
// X is a vector of floats, or a step of them, which takes every operation with all its vectors.
#pragma once

#include "lanes.h"

namespace adakd {
namespace ADAKD_ISA {

// Largest relative errors, with the rounding of fp32. They are those of the portable build, which has no fused
// multiply-adds; with these the errors are smaller.
constexpr float kExp2Error = 2.0e-7f;
constexpr float kLog2Error = 2.5e-7f;

// Horner's rule, the highest coefficient first.
template <class X, int n> ADAKD_INLINE X polynomial(const X& x, const float (&coefficient)[n]) {
  X y = broadcast<X>(coefficient[0]);
  for (int i = 1; i < n; ++i) y = fma(y, x, X(broadcast<X>(coefficient[i])));
  return y;
}

constexpr float kExp2[] = {1.3264727080119429e-3f, 9.671512862186355e-3f, 5.550733745645813e-2f,
                           2.4022242081843165e-1f, 6.931469775965886e-1f, 1.0f};
constexpr float kExp2OnUnit[] = {1.8793187336996198e-3f, 8.990993723273277e-3f, 5.581868812441826e-2f,
                                 2.401593029499054e-1f,  6.931517124176025e-1f, 1.0f};  // on [0, 1]
constexpr float kLog2[] = {0.0780667663f,  -0.174230263f, 0.216324881f,  -0.24272351f, 0.288191497f,
                           -0.360575914f, 0.480902076f,  -0.721348464f, 1.44269502f};

#if defined(ADAKD_AVX512)
// x less the nearest integer and less the integer below it, and 0 for an infinite x. y·2^n of the integer n below x, 0
// where n is far below the exponent's range.
ADAKD_INLINE Floats fraction(Floats x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT); }
ADAKD_INLINE Floats fraction_above(Floats x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF); }
ADAKD_INLINE Floats scaled(Floats y, Floats x) { return _mm512_scalef_ps(y, x); }
// 1 + f and e of log2. The factor is 4/3 rounded up: the product passes a power of two where x passes 1½ times one.
ADAKD_INLINE Floats mantissa(Floats x) { return _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero); }
ADAKD_INLINE Floats exponent(Floats x) { return _mm512_getexp_ps(x * 0x1.555556p0f); }
#else
// x less the nearest integer. y·2^n of an integer n of at least -127: there the exponent field comes out as 0, and so
// does the number.
ADAKD_INLINE Floats fraction(Floats x) {
#if defined(__AVX2__)
  return x - _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // Next to 1.5·2^23 neighbouring floats are 1 apart, so that the first sum rounds to an integer.
  const Floats shift = broadcast<Floats>(0x1.8p23f);
  return x - ((x + shift) - shift);
#endif
}
ADAKD_INLINE Floats scaled(Floats y, Floats n) {
  return (Floats)((Uints)y + ((Uints)__builtin_convertvector(n, Ints) << 23));
}
// The bits of ¾: the exponent field of the difference counts octaves from there on.
ADAKD_INLINE Ints octaves(Floats x) { return (Ints)((Uints)x - 0x3f400000u) >> 23; }
ADAKD_INLINE Floats mantissa(Floats x) { return (Floats)((Uints)x - ((Uints)octaves(x) << 23)); }
ADAKD_INLINE Floats exponent(Floats x) { return __builtin_convertvector(octaves(x), Floats); }
#endif

#define ADAKD_OF_STEP(function)                                                       \
  ADAKD_INLINE Step<Floats> function(const Step<Floats>& x) {                         \
    return Step<Floats>::of([&](int i) ADAKD_INLINE_LAMBDA { return function(x.at[i]); }); \
  }
ADAKD_OF_STEP(fraction)
#if defined(ADAKD_AVX512)
ADAKD_OF_STEP(fraction_above)
#endif
ADAKD_OF_STEP(mantissa)
ADAKD_OF_STEP(exponent)
#undef ADAKD_OF_STEP
ADAKD_INLINE Step<Floats> scaled(const Step<Floats>& y, const Step<Floats>& n) {
  return Step<Floats>::of([&](int i) ADAKD_INLINE_LAMBDA { return scaled(y.at[i], n.at[i]); });
}

template <class X> ADAKD_INLINE X exp2_of(X x) {
#if !defined(ADAKD_AVX512)
  x = max(X(broadcast<X>(-127.0f)), x);
#endif
  const X f = fraction(x);
  return scaled(polynomial(f, kExp2), x - f);
}
template <class X> ADAKD_INLINE X log2_of(const X& x) {
  const X f = mantissa(x) - broadcast<X>(1.0f);
  return fma(f, polynomial(f, kLog2), exponent(x));
}

ADAKD_INLINE Floats exp2(Floats x) { return exp2_of(x); }
ADAKD_INLINE Floats log2(Floats x) { return log2_of(x); }
ADAKD_INLINE Step<Floats> exp2(const Step<Floats>& x) { return exp2_of(x); }
ADAKD_INLINE Step<Floats> log2(const Step<Floats>& x) { return log2_of(x); }

template <class X> ADAKD_INLINE X mass_of(const X& x) {
#if defined(ADAKD_AVX512)
  if constexpr (!kIsDouble<X>) return scaled(polynomial(fraction_above(x), kExp2OnUnit), x);
#endif
  return exp2(x);
}

}  // namespace ADAKD_ISA
}  // namespace adakd
