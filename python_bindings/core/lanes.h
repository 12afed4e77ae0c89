// A vector of floats or doubles for the instruction set that this file is compiled for, and the few operations on it
// that the kernels need. Only this file and exp_log.h use intrinsics.
//
// The types are the compiler's own vectors (GCC and clang): + - * / and comparisons are operators, which the compiler
// translates for processors other than x86 too. The same source is compiled once for each instruction set, in a
// namespace that ADAKD_ISA names, because one inline function compiled for two instruction sets would be linked as
// either of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define ADAKD_AVX512 1
#endif

// Vectors are passed in registers only where calls are inlined.
#define ADAKD_INLINE inline __attribute__((always_inline))
#define ADAKD_INLINE_LAMBDA __attribute__((always_inline))

namespace adakd {
namespace ADAKD_ISA {

// Bytes of a vector. Without AVX the compiler makes two instructions of 16 bytes of each operation.
#if defined(ADAKD_AVX512)
constexpr int kBytes = 64;
#else
constexpr int kBytes = 32;
#endif

typedef float Floats __attribute__((vector_size(kBytes)));
typedef uint32_t Uints __attribute__((vector_size(kBytes)));
typedef double Doubles __attribute__((vector_size(kBytes)));
// What comparisons give: vectors of 32 and 64 bits. Which of the types of 64 bits it is depends on the compiler.
typedef decltype(Floats{} < Floats{}) Ints;
typedef decltype(Doubles{} < Doubles{}) Longs;

template <class V> struct Traits;
template <> struct Traits<Floats> {
  using Vector = Floats;
  using Scalar = float;
  using Mask = Ints;
  static constexpr int size = kBytes / 4;
};
template <> struct Traits<Doubles> {
  using Vector = Doubles;
  using Scalar = double;
  using Mask = Longs;
  static constexpr int size = kBytes / 8;
};
// One double: the divergences' formulas take it for the peak as they take vectors for the other entries.
template <> struct Traits<double> {
  using Vector = double;
  using Scalar = double;
  using Mask = bool;
  static constexpr int size = 1;
};
template <class V> using Scalar = typename Traits<V>::Scalar;
template <class V> using Mask = typename Traits<V>::Mask;
template <class V> using Vector = typename Traits<V>::Vector;  // V itself, or the vector of a step
template <class V> constexpr int kLanes = Traits<V>::size;
template <class V> constexpr bool kIsDouble = sizeof(Scalar<V>) == 8;

struct Bf16 { uint16_t bits; };
struct Half { uint16_t bits; };

// x in every lane. A scalar broadcasts in an operation with a vector only, and x - 0, unlike x + 0, keeps a zero's
// sign.
template <class V> ADAKD_INLINE V broadcast(Scalar<V> x) { return x - Vector<V>{}; }
template <class V> ADAKD_INLINE V constant(double x) { return broadcast<V>(static_cast<Scalar<V>>(x)); }

// a·b + c: rounded once if V is a vector of floats and the processor has the instruction (kFused), else twice.
#if defined(__AVX2__)
template <class V> constexpr bool kFused = sizeof(Scalar<V>) == 4;
#else
template <class V> constexpr bool kFused = false;
#endif
ADAKD_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(ADAKD_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
ADAKD_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return a * b + c; }

// a·b + c, rounded once everywhere for floats. Two roundings would lose a small c beside all large products of a row
// alike. Doubles have digits to spare.
ADAKD_INLINE Floats rounded_once(Floats a, Floats b, Floats c) {
#if defined(__AVX2__)
  return fma(a, b, c);
#else
  typedef double Wide __attribute__((vector_size(2 * kBytes)));
  const auto wide = [](Floats x) ADAKD_INLINE_LAMBDA { return __builtin_convertvector(x, Wide); };
  return __builtin_convertvector(wide(a) * wide(b) + wide(c), Floats);
#endif
}
ADAKD_INLINE Doubles rounded_once(Doubles a, Doubles b, Doubles c) { return a * b + c; }

// The larger value; b where one is NaN.
ADAKD_INLINE Floats max(Floats a, Floats b) {
#if defined(ADAKD_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
ADAKD_INLINE Doubles max(Doubles a, Doubles b) { return a > b ? a : b; }
ADAKD_INLINE Floats min(Floats a, Floats b) {
#if defined(ADAKD_AVX512)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
ADAKD_INLINE Doubles min(Doubles a, Doubles b) { return a < b ? a : b; }

// -|x| and |x|, by the sign bit.
ADAKD_INLINE Floats minus_absolute(Floats x) { return (Floats)((Uints)x | 0x80000000u); }
ADAKD_INLINE Doubles minus_absolute(Doubles x) { return (Doubles)((Longs)x | std::numeric_limits<int64_t>::min()); }
ADAKD_INLINE Floats absolute(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }
ADAKD_INLINE Doubles absolute(Doubles x) { return (Doubles)((Longs)x & 0x7fffffffffffffff); }

// The same operations on one double.
inline double fma(double a, double b, double c) { return a * b + c; }
inline double max(double a, double b) { return a > b ? a : b; }
inline double min(double a, double b) { return a < b ? a : b; }
inline double absolute(double x) { return std::fabs(x); }
inline double minus_absolute(double x) { return -std::fabs(x); }
inline double exp2(double x) { return std::exp2(x); }
inline double log2(double x) { return std::log2(x); }

// Whether any lane of a comparison holds.
ADAKD_INLINE bool any(Ints mask) {
#if defined(ADAKD_AVX512)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t some = 0;
  for (int i = 0; i < kLanes<Floats>; ++i) some |= mask[i];
  return some != 0;
#endif
}
ADAKD_INLINE bool any(Longs mask) {
  int64_t some = 0;
  for (int i = 0; i < kLanes<Doubles>; ++i) some |= mask[i];
  return some != 0;
}

// Whether no lane of either is infinite or NaN. The backward asks for every pair of vectors, so this has to be cheap.
ADAKD_INLINE bool all_finite(Floats a, Floats b) {
#if defined(ADAKD_AVX512)
  constexpr int kNotFinite = 0x01 | 0x08 | 0x10 | 0x80;  // quiet NaN, +inf, -inf, signalling NaN
  return !(_mm512_fpclass_ps_mask(a, kNotFinite) | _mm512_fpclass_ps_mask(b, kNotFinite));
#else
  // The exponent of a number that is not finite is all ones, so adding one to it carries into the sign.
  const Uints carried = (((Uints)a & 0x7f800000u) + 0x00800000u) | (((Uints)b & 0x7f800000u) + 0x00800000u);
#if defined(__AVX2__)
  return _mm256_movemask_ps((__m256)carried) == 0;
#else
  uint32_t any = 0;
  for (int i = 0; i < kLanes<Floats>; ++i) any |= carried[i];
  return any < 0x80000000u;
#endif
#endif
}

// 2^x of x < 128: 0 for x <= -127, NaN for NaN. log2(x) of a normal positive x. Both are in exp_log.h, with their
// errors.
ADAKD_INLINE Floats exp2(Floats x);
ADAKD_INLINE Floats log2(Floats x);

// Doubles are the rare case, and the library's functions are accurate enough for them.
ADAKD_INLINE Doubles exp2(Doubles x) {
  for (int i = 0; i < kLanes<Doubles>; ++i) x[i] = std::exp2(x[i]);
  return x;
}
ADAKD_INLINE Doubles log2(Doubles x) {
  for (int i = 0; i < kLanes<Doubles>; ++i) x[i] = std::log2(x[i]);
  return x;
}

// mask ? a : b, lane by lane.
template <class V> ADAKD_INLINE V select(Mask<V> mask, V a, V b) { return mask ? a : b; }

// What a loop loads at once: a step of several vectors. Where kTogether holds, each operation takes all of them before the
// next one does. Vector after vector, the processor would wait: an entry of some divergences is a chain of 40 operations,
// and the processor looks ahead at two or three such chains. AVX-512 has the registers for four vectors; the 16 registers
// of AVX2 are too few for two; doubles are too rare.
#if defined(ADAKD_AVX512)
template <class V> constexpr bool kTogether = !kIsDouble<V>;
template <class V> constexpr int kVectors = kTogether<V> ? 4 : 2;
#elif defined(__AVX2__)
template <class V> constexpr bool kTogether = false;
template <class V> constexpr int kVectors = 2;
#else
template <class V> constexpr bool kTogether = !kIsDouble<V>;
template <class V> constexpr int kVectors = 2;
#endif
// Entries of a step.
template <class V> constexpr int kStep = kVectors<V> * kLanes<V>;

template <class V> struct Step {
  V at[kVectors<V>];

  Step() = default;
  ADAKD_INLINE Step(V x) : Step(of([&](int) ADAKD_INLINE_LAMBDA { return x; })) {}  // x in every vector

  // The step of function(i) for each vector i. There is no loop, which the compiler would have to unroll first.
  template <class Function> static ADAKD_INLINE Step of(Function function) {
    Step x;
    for_each([&](int i) ADAKD_INLINE_LAMBDA { x.at[i] = function(i); });
    return x;
  }
  template <class Use> static ADAKD_INLINE void for_each(Use use) {
    for_each(use, std::make_integer_sequence<int, kVectors<V>>{});
  }

  struct Mask {
    adakd::ADAKD_ISA::Mask<V> at[kVectors<V>];
  };
  template <class Compare> static ADAKD_INLINE Mask mask_of(Compare compare) {
    Mask x;
    for_each([&](int i) ADAKD_INLINE_LAMBDA { x.at[i] = compare(i); });
    return x;
  }

#define ADAKD_STEP(type, make, name, parameters, expression)     \
  friend ADAKD_INLINE type name parameters {                     \
    return make([&](int i) ADAKD_INLINE_LAMBDA { return expression; }); \
  }
  ADAKD_STEP(Step, of, operator+, (const Step& a, const Step& b), a.at[i] + b.at[i])
  ADAKD_STEP(Step, of, operator-, (const Step& a, const Step& b), a.at[i] - b.at[i])
  ADAKD_STEP(Step, of, operator*, (const Step& a, const Step& b), a.at[i] * b.at[i])
  ADAKD_STEP(Step, of, operator/, (const Step& a, const Step& b), a.at[i] / b.at[i])
  ADAKD_STEP(Step, of, operator-, (const Step& a), -a.at[i])
  ADAKD_STEP(Step, of, max, (const Step& a, const Step& b), max(a.at[i], b.at[i]))
  ADAKD_STEP(Step, of, min, (const Step& a, const Step& b), min(a.at[i], b.at[i]))
  ADAKD_STEP(Step, of, fma, (const Step& a, const Step& b, const Step& c), fma(a.at[i], b.at[i], c.at[i]))
  ADAKD_STEP(Step, of, rounded_once, (const Step& a, const Step& b, const Step& c),
             rounded_once(a.at[i], b.at[i], c.at[i]))
  ADAKD_STEP(Step, of, absolute, (const Step& a), absolute(a.at[i]))
  ADAKD_STEP(Step, of, minus_absolute, (const Step& a), minus_absolute(a.at[i]))
  ADAKD_STEP(Step, of, select, (const Mask& mask, const Step& a, const Step& b),
             select<V>(mask.at[i], a.at[i], b.at[i]))
  ADAKD_STEP(Mask, mask_of, operator&, (const Mask& a, const Mask& b), a.at[i] & b.at[i])
  ADAKD_STEP(Mask, mask_of, operator>, (const Step& a, const Step& b), a.at[i] > b.at[i])
  ADAKD_STEP(Mask, mask_of, operator<, (const Step& a, const Step& b), a.at[i] < b.at[i])
  ADAKD_STEP(Mask, mask_of, operator<=, (const Step& a, const Step& b), a.at[i] <= b.at[i])
  ADAKD_STEP(Mask, mask_of, operator!=, (const Step& a, const Step& b), a.at[i] != b.at[i])
#undef ADAKD_STEP

 private:
  template <class Use, int... i> static ADAKD_INLINE void for_each(Use use, std::integer_sequence<int, i...>) {
    (use(i), ...);
  }
};
template <class V> struct Traits<Step<V>> {
  using Scalar = typename Traits<V>::Scalar;
  using Mask = typename Step<V>::Mask;
  using Vector = V;
  static constexpr int size = kStep<V>;
};
// Calls use(s, t, i) for two steps or, one after the other, for their vectors. i is the number of the first vector.
template <class V, class Use> ADAKD_INLINE void each(const Step<V>& s, const Step<V>& t, Use use) {
  if constexpr (kTogether<V>) {
    use(s, t, 0);
  } else {
    Step<V>::for_each([&](int i) ADAKD_INLINE_LAMBDA { use(s.at[i], t.at[i], i); });
  }
}
template <class V> ADAKD_INLINE bool all_finite(const Step<V>& x) {
  bool finite = true;
  for (int i = 0; i < kVectors<V>; i += 2) finite &= all_finite(x.at[i], x.at[i + 1]);
  return finite;
}
template <class V> ADAKD_INLINE V max(const Step<V>& x, V most) {
  Step<V>::for_each([&](int i) ADAKD_INLINE_LAMBDA { most = max(x.at[i], most); });
  return most;
}

// Two vectors of consecutive logits, 2 * kLanes<V> of them. Of bf16 logits the first vector holds those at even places
// and the second those at odd ones, which takes one load and no shuffle. store_pair is the inverse of load_pair.
template <class V> struct Pair { V first, second; };

// All lanes of a vector joined into one number, in log2(lanes) steps of one half with the other. A loop over the lanes
// would be a chain of dependent operations.
template <class S, class X, class Join> ADAKD_INLINE S across(X x, Join join) {
  if constexpr (sizeof(X) == sizeof(S)) {
    return x[0];
  } else {
    typedef S HalfOfX __attribute__((vector_size(sizeof(X) / 2)));
    HalfOfX halves[2];
    std::memcpy(halves, &x, sizeof x);
    return across<S>(join(halves[0], halves[1]), join);
  }
}

// A sum over the vectors of a few steps, lane by lane.
template <class V> struct ChainSum {
  V first{}, second{};

  // i: the number of the vector in its step, or 0 for a step.
  ADAKD_INLINE void add(const V& x, int i) { half(i) += x; }
  ADAKD_INLINE void add(const Step<V>& x, int) {
    Step<V>::for_each([&](int i) ADAKD_INLINE_LAMBDA { add(x.at[i], i); });
  }
  ADAKD_INLINE void add_product(const V& x, const V& y, int i) { half(i) = fma(x, y, half(i)); }
  ADAKD_INLINE void add_product(const Step<V>& x, const Step<V>& y, int) {
    Step<V>::for_each([&](int i) ADAKD_INLINE_LAMBDA { add_product(x.at[i], y.at[i], i); });
  }

 private:
  ADAKD_INLINE V& half(int i) { return i % 2 == 0 ? first : second; }
};

// A sum over a block, lane by lane, in two levels: the caller adds a few vectors to one another and take() adds that to
// the sum of all. In one long chain of float additions every small mass would be rounded against the one large mass of
// a confident token, and the token's gradient is a difference from that. Sums of blocks are added in double, by
// value().
template <class V> struct Total {
  Pair<V> sum{};

  // Adds the sum of a chain, and sets it to 0 for the next one.
  ADAKD_INLINE void take(ChainSum<V>& chain) {
    sum.first += chain.first;
    sum.second += chain.second;
    chain = {};
  }
  ADAKD_INLINE double value() const {
    Doubles lanes;
    if constexpr (sizeof(Scalar<V>) == 8) {
      lanes = sum.first + sum.second;
    } else {
      // Half a vector of floats widens to a vector of doubles; `sum` is four such halves.
      typedef float HalfVector __attribute__((vector_size(kBytes / 2)));
      HalfVector half[4];
      std::memcpy(half, &sum, sizeof sum);
      const auto wide = [](HalfVector x) ADAKD_INLINE_LAMBDA { return __builtin_convertvector(x, Doubles); };
      lanes = (wide(half[0]) + wide(half[2])) + (wide(half[1]) + wide(half[3]));
    }
    return across<double>(lanes, [](auto a, auto b) ADAKD_INLINE_LAMBDA { return a + b; });
  }
};

template <class V> ADAKD_INLINE Scalar<V> max_lanes(V x) {
  return across<Scalar<V>>(x, [](auto a, auto b) ADAKD_INLINE_LAMBDA { return a > b ? a : b; });
}

template <class V> ADAKD_INLINE V load(const Scalar<V>* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V> ADAKD_INLINE void store(Scalar<V>* p, V v) { std::memcpy(p, &v, sizeof v); }
template <class V> ADAKD_INLINE void store(Scalar<V>* p, const Step<V>& x) {
  Step<V>::for_each([&](int i) ADAKD_INLINE_LAMBDA { store<V>(p + i * kLanes<V>, x.at[i]); });
}
// Stores past the cache: the gradient is not read soon, and would displace the logits. p is aligned to kBytes.
ADAKD_INLINE void stream(void* p, Uints v) {
#if defined(ADAKD_AVX512)
  _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
  __m128i half[2];
  std::memcpy(half, &v, sizeof v);
  _mm_stream_si128(static_cast<__m128i*>(p), half[0]);
  _mm_stream_si128(static_cast<__m128i*>(p) + 1, half[1]);
#else
  std::memcpy(p, &v, sizeof v);
#endif
}

// Orders streamed stores before the thread's later stores, as other threads see them.
ADAKD_INLINE void end_of_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Asks for the logits of a later step where the processor is faster for it (prefetch_distance). The address may lie
// behind the row, because a prefetch never faults; it is computed as an integer, because such a pointer would be
// undefined behaviour.
template <class V, class T> ADAKD_INLINE void prefetch_after(const T* p) {
  if (prefetch_distance == 0) return;
  constexpr int kLine = 64;
  for (int i = 0; i < kStep<V> * static_cast<int>(sizeof(T)); i += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + prefetch_distance + i));
  }
}

ADAKD_INLINE Pair<Floats> load_pair(const float* p) { return {load<Floats>(p), load<Floats>(p + kLanes<Floats>)}; }
ADAKD_INLINE Pair<Doubles> load_pair(const double* p) { return {load<Doubles>(p), load<Doubles>(p + kLanes<Doubles>)}; }
ADAKD_INLINE Pair<Floats> load_pair(const Bf16* p) {
  Uints both;
  std::memcpy(&both, p, sizeof both);
  return {(Floats)(both << 16), (Floats)(both & 0xffff0000u)};
}

// Whether the instruction set converts vectors of fp16. Else they are widened and narrowed one by one.
#if defined(__F16C__)
constexpr bool kConvertsHalf = true;
ADAKD_INLINE Pair<Floats> load_pair(const Half* p) {
#if defined(ADAKD_AVX512)
  const auto widened = [](const Half* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); };
#else
  const auto widened = [](const Half* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); };
#endif
  return {widened(p), widened(p + kLanes<Floats>)};
}
#else
constexpr bool kConvertsHalf = false;
#endif

template <class V, class T> ADAKD_INLINE Step<V> load_step(const T* p) {
  prefetch_after<V>(p);
  Step<V> x;
  for (int i = 0; i < kVectors<V>; i += 2) {
    const Pair<V> two = load_pair(p + i * kLanes<V>);
    x.at[i] = two.first;
    x.at[i + 1] = two.second;
  }
  return x;
}

template <bool kStream> ADAKD_INLINE void store_bits(void* p, Uints bits) {
  if (kStream) {
    stream(p, bits);
  } else {
    std::memcpy(p, &bits, sizeof bits);
  }
}
template <bool kStream> ADAKD_INLINE void store_pair(float* p, Pair<Floats> x) {
  store_bits<kStream>(p, (Uints)x.first);
  store_bits<kStream>(p + kLanes<Floats>, (Uints)x.second);
}
// Rounded to the nearest bf16, ties to even, which is then the upper half of each lane. x is finite.
ADAKD_INLINE Uints rounded_to_bf16(Floats x) {
  const Uints bits = (Uints)x;
  return bits + ((bits >> 16) & 1u) + 0x7fffu;
}
template <bool kStream> ADAKD_INLINE void store_pair(Bf16* p, Pair<Floats> x) {
  store_bits<kStream>(p, (rounded_to_bf16(x.first) >> 16) | (rounded_to_bf16(x.second) & 0xffff0000u));
}
#if defined(__F16C__)
template <bool kStream> ADAKD_INLINE void store_pair(Half* p, Pair<Floats> x) {
  constexpr int kToEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#if defined(ADAKD_AVX512)
  const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(x.first, kToEven));
  store_bits<kStream>(p, (Uints)_mm512_inserti64x4(low, _mm512_cvtps_ph(x.second, kToEven), 1));
#else
  const __m128i low = _mm256_cvtps_ph(x.first, kToEven), high = _mm256_cvtps_ph(x.second, kToEven);
  store_bits<kStream>(p, (Uints)_mm256_set_m128i(high, low));
#endif
}
#endif

template <bool kStream, class V, class T> ADAKD_INLINE void store_step(T* p, const Step<V>& x) {
  for (int i = 0; i < kVectors<V>; i += 2) store_pair<kStream>(p + i * kLanes<V>, Pair<V>{x.at[i], x.at[i + 1]});
}

// Conversions of single logits: for blocks that are widened to scratch memory, and for the peak.
ADAKD_INLINE float widen(float x) { return x; }
ADAKD_INLINE double widen(double x) { return x; }
ADAKD_INLINE float widen(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
ADAKD_INLINE float widen(Half x) {
  const uint32_t magnitude = x.bits & 0x7fff, sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  // A subnormal number is its fraction times 2^-24. Otherwise the exponent's bias grows by 112, and by as much again
  // for infinity and NaN, whose exponent has to become the largest.
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t bits;
  std::memcpy(&bits, &subnormal, sizeof bits);
  if (magnitude >= 0x0400) bits = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u);
  bits |= sign;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
ADAKD_INLINE void narrow(double x, double* out) { *out = x; }
ADAKD_INLINE void narrow(double x, float* out) { *out = static_cast<float>(x); }
ADAKD_INLINE void narrow(float x, double* out) { *out = x; }
ADAKD_INLINE void narrow(float x, float* out) { *out = x; }
ADAKD_INLINE void narrow(float x, Bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16);
}
ADAKD_INLINE void narrow(float x, Half* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16) & 0x8000;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00;  // NaN
  } else if (bits >= 0x477ff000u) {
    half = 0x7c00;  // rounds to infinity
  } else if (bits < 0x38800000u) {
    // The result is subnormal: adding ½ leaves its fraction, rounded to even, in the low bits.
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&half, &magnitude, sizeof half);
    half -= 0x3f000000u;
  } else {
    half = (bits + 0xc8000fffu + ((bits >> 13) & 1u)) >> 13;  // the exponent's bias less 112, rounded to even
  }
  out->bits = static_cast<uint16_t>(sign | half);
}
ADAKD_INLINE void narrow(double x, Bf16* out) { narrow(static_cast<float>(x), out); }
ADAKD_INLINE void narrow(double x, Half* out) { narrow(static_cast<float>(x), out); }

// While this lives, results and operands below the normal range are 0. Such masses change no sum, and some processors
// are slow on them.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  // Bit 15 is for results (FTZ), bit 6 for operands (DAZ).
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushSubnormals() {}
#endif
};

}  // namespace ADAKD_ISA
}  // namespace adakd
