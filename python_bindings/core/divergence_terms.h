// The divergences, entry by entry: f and g of docs/maths.md, section 3, and the gradient of equation (10).
//
// A divergence is a class with
//   terms(at, f, g): its summand and g = q ∂f/∂q, where a second sweep needs them;
//   gradient(at, w, w_sum_g): w·(g - q·Σg), with w_sum_g = w·Σg.
// Logarithms are to base 2. The larger of p and q is taken out of every mixture, so that log-ratios of masses that
// underflow stay finite and everything is exactly 0 at p = q.
#pragma once

#include "rows.h"

namespace adakd {
namespace ADAKD_ISA {

// The parameters and what they lack of 1. The larger of two weights is taken from the smaller: so neither loses digits, and
// they add up to 1.
template <class V> struct Parameters {
  V alpha, rest_of_alpha, beta, rest_of_beta;
  V both, whole, part;  // α + β; the nearest whole number and what it lacks
  V per_alpha;          // 1/α
  bool lopsided;        // a mixture of them is next to one of its parts
  V own_sign{};         // kSign: that of the peak's log-ratio, by which g is lowered everywhere

  Parameters(double alpha, double beta) {
    split(alpha, this->alpha, rest_of_alpha);
    split(beta, this->beta, rest_of_beta);
    both = constant<V>(alpha + beta);
    whole = constant<V>(std::nearbyint(alpha + beta));
    part = constant<V>(alpha + beta - std::nearbyint(alpha + beta));
    per_alpha = constant<V>(1.0 / alpha);
    lopsided = is_lopsided(alpha) || is_lopsided(beta);
  }

  // The same numbers, rounded as they are, for one entry.
  Parameters<double> in_double() const {
    Parameters<double> x(0.0, 0.0);
    x.alpha = alpha[0], x.rest_of_alpha = rest_of_alpha[0], x.beta = beta[0], x.rest_of_beta = rest_of_beta[0];
    x.both = both[0], x.whole = whole[0], x.part = part[0];
    x.per_alpha = per_alpha[0], x.lopsided = lopsided;
    return x;
  }

 private:
  static void split(double x, V& part, V& rest) {
    part = constant<V>(x);
    rest = constant<V>(1.0 - x);
    if (0.5 < x && x < 1.0) part = constant<V>(1.0) - rest;
    if (x <= 0.5) rest = constant<V>(1.0) - part;
  }
  static bool is_lopsided(double x) { return x != 0.0 && !(0.01 < x && x < 0.99); }
};

// What the classes share. kTwoSweeps: f and g need the normalisers first. kWithoutQ: g leaves out the term q, which
// cancels in (10) while every entry counts; where entries are left out, their mass comes off Σg instead. kMixture: takes
// logarithms of a mixture of q and p. kSign: of a log-ratio, g takes nothing but the sign. kUnbounded: g grows with the
// log-ratio, so that an infinite one or an overflow shows in the gradient.
template <class V> struct Terms {
  static constexpr bool kTwoSweeps = false, kWithoutQ = false, kSign = false, kUnbounded = false, kMixture = false;
  const Parameters<V>& parameters;
  explicit Terms(const Parameters<V>& parameters) : parameters(parameters) {}
  // The least power to which the terms raise a mass.
  static double least_power(double, double) { return 1.0; }
};

// use(parameters), with `lopsided` known to the compiler: a branch in the loop would cost more than a second loop.
template <class Divergence, class V, class Use> ADAKD_INLINE auto unswitched(Parameters<V> parameters, Use use) {
  if (Divergence::kMixture && parameters.lopsided) return use(parameters);
  parameters.lopsided = false;
  return use(parameters);
}

// An entry: log2 q, log2 p and their difference.
template <class V> struct Entry {
  V log_q, log_p, gap;
};

// p and q over the larger of them, and that one.
template <class V> struct Ratios {
  V top, r_p, r_q;

  ADAKD_INLINE explicit Ratios(const Entry<V>& at) {
    const V one = constant<V>(1.0), low = exp2(minus_absolute(at.gap));
    const Mask<V> q_above = at.gap > 0;
    top = exp2(max(at.log_q, at.log_p));
    r_p = q_above ? low : one;
    r_q = q_above ? one : low;
  }
};

// log2(q/m) is at least log2 q: below this, q is 0 in every type, and the logarithm must only not overflow.
constexpr double kLeastLog = -1100.0;
template <class V> ADAKD_INLINE V above_overflow(V x) { return max(constant<V>(kLeastLog), x); }

// q·(w·x - w_sum_g). Where q is 0, w·x may leave the type's range, and 0·inf is NaN. Floats are then computed again in
// double; double, which has no wider type, multiplies x with q first.
template <class V> ADAKD_INLINE V weighted(V q, V w, V x, V w_sum_g) {
  if constexpr (sizeof(Scalar<V>) == 8) return fma(w, q * x, -(q * w_sum_g));
  return q * fma(w, x, -w_sum_g);
}

// log2(p/m) and log2(q/m) for m = weight_p·p + weight_q·q.
template <class V> struct LogsOverMixture {
  V p, q;

  // `mix` is m over the larger of p and q.
  ADAKD_INLINE LogsOverMixture(V gap, V mix, V weight_p, V weight_q, bool lopsided) {
    const V log_mix = log2(mix);
    p = min(V{}, -gap) - log_mix;
    q = min(V{}, gap) - log_mix;
    if (!lopsided) return;
    // Where m is next to its heavy part, that part's logarithm is next to 0: it is taken as that of 1 + x, from a small x
    // with all its digits.
    const V one = constant<V>(1.0), most = constant<V>(100.0);
    const Mask<V> heavy_q = weight_q > weight_p;
    const V light = min(weight_p, weight_q), log_over_heavy = heavy_q ? -gap : gap;
    const V over_heavy = exp2(min(most, log_over_heavy)), x = light * (over_heavy - one), sum = one + x;
    const V of_heavy = -(log2(sum) + constant<V>(kLog2e) * (x - (sum - one)));
    const V of_light = log_over_heavy + of_heavy;
    const Mask<V> near = light * over_heavy <= one;
    p = near ? (heavy_q ? of_light : of_heavy) : p;
    q = near ? (heavy_q ? of_heavy : of_light) : q;
  }
};

template <class V> struct ForwardKL : Terms<V> {
  using Terms<V>::Terms;
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    return -fma(w, exp2(at.log_p), w_sum_g * exp2(at.log_q));
  }
};

template <class V> struct ReverseKL : Terms<V> {
  static constexpr bool kUnbounded = true;
  using Terms<V>::Terms;
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    return weighted(exp2(at.log_q), w * constant<V>(kLn2), at.gap, w_sum_g);
  }
};

template <class V> struct Jeffreys : Terms<V> {
  static constexpr bool kUnbounded = true;
  using Terms<V>::Terms;
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    return fma(-w, exp2(at.log_p), weighted(exp2(at.log_q), w * constant<V>(kLn2), at.gap, w_sum_g));
  }
};

template <class V> struct Hellinger : Terms<V> {
  using Terms<V>::Terms;
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    const V half = constant<V>(0.5), root_q = exp2(half * at.log_q), root_p = exp2(half * at.log_p);
    return -root_q * fma(half * w, root_p, w_sum_g * root_q);
  }
};

template <class V> struct TotalVariation : Terms<V> {
  static constexpr bool kTwoSweeps = true, kSign = true;
  using Terms<V>::Terms;
  static ADAKD_INLINE V sign(const Entry<V>& at) {
    const V one = constant<V>(1.0), zero = V{};
    return at.gap > 0 ? one : (at.gap < 0 ? -one : at.gap - at.gap + zero);  // NaN stays NaN
  }
  ADAKD_INLINE void terms(const Entry<V>& at, V& f, V& g) const {
    const Ratios<V> r(at);
    const V half_top = constant<V>(0.5) * r.top;
    f = half_top * absolute(r.r_p - r.r_q);
    g = half_top * r.r_q * (sign(at) - this->parameters.own_sign);
  }
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    return exp2(at.log_q) * fma(constant<V>(0.5) * w, sign(at) - this->parameters.own_sign, -w_sum_g);
  }
};

template <class V> struct JensenShannon : Terms<V> {
  static constexpr bool kTwoSweeps = true, kMixture = true;
  using Terms<V>::Terms;
  using Terms<V>::parameters;
  ADAKD_INLINE LogsOverMixture<V> logs(const Entry<V>& at, const Ratios<V>& r) const {
    const V mix = fma(parameters.beta, r.r_p, parameters.rest_of_beta * r.r_q);
    return {at.gap, mix, parameters.beta, parameters.rest_of_beta, parameters.lopsided};
  }
  ADAKD_INLINE void terms(const Entry<V>& at, V& f, V& g) const {
    const Ratios<V> r(at);
    const LogsOverMixture<V> log = logs(at, r);
    const V scale = constant<V>(kLn2) * r.top, q_part = parameters.rest_of_beta * r.r_q * log.q;
    g = scale * q_part;
    f = scale * fma(parameters.beta * r.r_p, log.p, q_part);
  }
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    const Ratios<V> r(at);
    const V weight = w * parameters.rest_of_beta * constant<V>(kLn2);
    return weighted(r.top * r.r_q, weight, above_overflow(logs(at, r).q), w_sum_g);
  }
};

template <class V> struct SkewForwardKL : Terms<V> {
  static constexpr bool kTwoSweeps = true, kMixture = true;
  using Terms<V>::Terms;
  using Terms<V>::parameters;
  ADAKD_INLINE void terms(const Entry<V>& at, V& f, V& g) const {
    const Ratios<V> r(at);
    const V rest = parameters.rest_of_alpha;
    const V mix = fma(parameters.alpha, r.r_p, rest * r.r_q), p = r.top * r.r_p;
    f = constant<V>(kLn2) * p * LogsOverMixture<V>(at.gap, mix, parameters.alpha, rest, parameters.lopsided).p;
    g = -rest * p * (r.r_q / mix);
  }
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    const Ratios<V> r(at);
    const V rest = parameters.rest_of_alpha;
    const V mix = fma(parameters.alpha, r.r_p, rest * r.r_q);
    return -(r.top * r.r_q) * fma(w * rest, r.r_p / mix, w_sum_g);
  }
};

template <class V> struct SkewReverseKL : Terms<V> {
  static constexpr bool kTwoSweeps = true, kWithoutQ = true, kMixture = true;
  using Terms<V>::Terms;
  using Terms<V>::parameters;
  // log2(q/m)·ln 2 and α·q/m.
  ADAKD_INLINE void parts(const Entry<V>& at, const Ratios<V>& r, V& log_ratio, V& share) const {
    const V mix = fma(parameters.alpha, r.r_q, parameters.rest_of_alpha * r.r_p);
    const LogsOverMixture<V> log(at.gap, mix, parameters.rest_of_alpha, parameters.alpha, parameters.lopsided);
    log_ratio = constant<V>(kLn2) * log.q;
    share = parameters.alpha * (r.r_q / mix);
  }
  ADAKD_INLINE void terms(const Entry<V>& at, V& f, V& g) const {
    const Ratios<V> r(at);
    const V q = r.top * r.r_q;
    V log_ratio, share;
    parts(at, r, log_ratio, share);
    f = q * log_ratio;
    g = fma(-q, share, f);
  }
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    const Ratios<V> r(at);
    V log_ratio, share;
    parts(at, r, log_ratio, share);
    return weighted(r.top * r.r_q, w, above_overflow(log_ratio - share), w_sum_g);
  }
};

template <class V> struct AlphaBeta : Terms<V> {
  static constexpr bool kTwoSweeps = true;
  using Terms<V>::Terms;
  using Terms<V>::parameters;
  static double least_power(double alpha, double beta) { return min(1.0, alpha + beta); }
  // x·(α + β). An error of α + β would be one of all powers alike, and not average out over the vocabulary: the part has
  // more digits.
  ADAKD_INLINE V times_both(V x) const { return fma(parameters.whole, x, parameters.part * x); }

  // p^(α+β), q^(α+β) and p^α·q^β, each over the first result.
  ADAKD_INLINE V powers(const Entry<V>& at, V& p_ab, V& q_ab, V& mixed) const {
    const V one = constant<V>(1.0);
    const Mask<V> q_above = at.gap > 0;
    const V low = exp2(times_both(minus_absolute(at.gap)));  // gap is finite where this counts
    mixed = exp2(q_above ? -parameters.alpha * at.gap : parameters.beta * at.gap);
    p_ab = q_above ? low : one;
    q_ab = q_above ? one : low;
    // Of -inf the two terms of the product would cancel.
    return exp2(times_both(max(constant<V>(-1.0e4), max(at.log_q, at.log_p))));
  }
  ADAKD_INLINE void terms(const Entry<V>& at, V& f, V& g) const {
    const V alpha = parameters.alpha, beta = parameters.beta, one = constant<V>(1.0);
    V p_ab, q_ab, mixed;
    const V scale = powers(at, p_ab, q_ab, mixed);
    f = scale * fma(alpha, p_ab - mixed, beta * (q_ab - mixed)) * (one / (alpha * beta * parameters.both));
    g = scale * (q_ab - mixed) * parameters.per_alpha;
  }
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    V p_ab, q_ab, mixed;
    const V scale = powers(at, p_ab, q_ab, mixed);
    return fma(w * parameters.per_alpha, scale * (q_ab - mixed), -w_sum_g * exp2(at.log_q));
  }
};

// The token counts for the cross-entropy alone.
template <class V> struct None : Terms<V> {
  using Terms<V>::Terms;
  ADAKD_INLINE V gradient(const Entry<V>&, V, V) const { return V{}; }
};

// Calls use(tag) with the divergence's class in the tag. Every divergence of the list has its case, so `use` is called.
template <template <class> class D> struct Tag {
  template <class V> using Of = D<V>;
};
template <class Use> inline void with_divergence(Divergence name, Use use) {
  switch (name) {
#define ADAKD_CASE(Class, name) \
  case Divergence::k##Class: return use(Tag<Class>{});
    ADAKD_DIVERGENCES(ADAKD_CASE)
#undef ADAKD_CASE
  }
}

}  // namespace ADAKD_ISA
}  // namespace adakd
