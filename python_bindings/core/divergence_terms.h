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

template <class V> struct Parameters {
  V alpha, beta;
};

// What the classes share. kTwoSweeps: f and g need the normalisers first. kWithoutQ: g leaves out the term q, which
// cancels in (10) while every entry counts; where entries are left out, their mass comes off Σg instead.
template <class V> struct Terms {
  static constexpr bool kTwoSweeps = false, kWithoutQ = false;
  const Parameters<V>& parameters;
  explicit Terms(const Parameters<V>& parameters) : parameters(parameters) {}
};

// An entry: log2 q, log2 p and their difference.
template <class V> struct Entry {
  V log_q, log_p, gap;
};

template <class V> ADAKD_INLINE V constant(double x) { return broadcast<V>(static_cast<Scalar<V>>(x)); }

// p and q over the larger of them, and that one.
template <class V> struct Ratios {
  V top, r_p, r_q;

  ADAKD_INLINE explicit Ratios(const Entry<V>& at) {
    const V one = constant<V>(1.0), low = exp2(-absolute(at.gap));
    const Mask<V> q_above = at.gap > 0;
    top = exp2(max(at.log_q, at.log_p));
    r_p = q_above ? low : one;
    r_q = q_above ? one : low;
  }
};

template <class V> struct ForwardKL : Terms<V> {
  using Terms<V>::Terms;
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    return -fma(w, exp2(at.log_p), w_sum_g * exp2(at.log_q));
  }
};

template <class V> struct ReverseKL : Terms<V> {
  using Terms<V>::Terms;
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    return exp2(at.log_q) * fma(at.gap, w * constant<V>(kLn2), -w_sum_g);
  }
};

template <class V> struct Jeffreys : Terms<V> {
  using Terms<V>::Terms;
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    return fma(-w, exp2(at.log_p), exp2(at.log_q) * fma(at.gap, w * constant<V>(kLn2), -w_sum_g));
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
  static constexpr bool kTwoSweeps = true;
  using Terms<V>::Terms;
  static ADAKD_INLINE V sign(const Entry<V>& at) {
    const V one = constant<V>(1.0), zero = V{};
    return at.gap > 0 ? one : (at.gap < 0 ? -one : at.gap - at.gap + zero);  // NaN stays NaN
  }
  ADAKD_INLINE void terms(const Entry<V>& at, V& f, V& g) const {
    const Ratios<V> r(at);
    const V half_top = constant<V>(0.5) * r.top;
    f = half_top * absolute(r.r_p - r.r_q);
    g = half_top * r.r_q * sign(at);
  }
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    return exp2(at.log_q) * fma(constant<V>(0.5) * w, sign(at), -w_sum_g);
  }
};

template <class V> struct JensenShannon : Terms<V> {
  static constexpr bool kTwoSweeps = true;
  using Terms<V>::Terms;
  using Terms<V>::parameters;
  // log2(q/m), and log2 m over the larger of p and q.
  ADAKD_INLINE V log_q_over_mixture(const Entry<V>& at, const Ratios<V>& r, V& log_mix) const {
    const V beta = parameters.beta;
    log_mix = log2(fma(beta, r.r_p, (constant<V>(1.0) - beta) * r.r_q));
    return min(V{}, at.gap) - log_mix;
  }
  ADAKD_INLINE void terms(const Entry<V>& at, V& f, V& g) const {
    const Ratios<V> r(at);
    V log_mix;
    const V q_term = log_q_over_mixture(at, r, log_mix), p_term = min(V{}, -at.gap) - log_mix;
    const V scale = constant<V>(kLn2) * r.top;
    g = (constant<V>(1.0) - parameters.beta) * scale * r.r_q * q_term;
    f = fma(parameters.beta * scale * r.r_p, p_term, g);
  }
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    const Ratios<V> r(at);
    V log_mix;
    const V weight = w * (constant<V>(1.0) - parameters.beta) * constant<V>(kLn2);
    return r.top * r.r_q * fma(weight, log_q_over_mixture(at, r, log_mix), -w_sum_g);
  }
};

template <class V> struct SkewForwardKL : Terms<V> {
  static constexpr bool kTwoSweeps = true;
  using Terms<V>::Terms;
  using Terms<V>::parameters;
  ADAKD_INLINE void terms(const Entry<V>& at, V& f, V& g) const {
    const Ratios<V> r(at);
    const V rest = constant<V>(1.0) - parameters.alpha;
    const V mix = fma(parameters.alpha, r.r_p, rest * r.r_q), p = r.top * r.r_p;
    f = constant<V>(kLn2) * p * (min(V{}, -at.gap) - log2(mix));
    g = -rest * p * (r.r_q / mix);
  }
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    const Ratios<V> r(at);
    const V rest = constant<V>(1.0) - parameters.alpha;
    const V mix = fma(parameters.alpha, r.r_p, rest * r.r_q);
    return -(r.top * r.r_q) * fma(w * rest, r.r_p / mix, w_sum_g);
  }
};

template <class V> struct SkewReverseKL : Terms<V> {
  static constexpr bool kTwoSweeps = true, kWithoutQ = true;
  using Terms<V>::Terms;
  using Terms<V>::parameters;
  // log2(q/m)·ln 2 and α·q/m.
  ADAKD_INLINE void parts(const Entry<V>& at, const Ratios<V>& r, V& log_ratio, V& share) const {
    const V mix = fma(parameters.alpha, r.r_q, (constant<V>(1.0) - parameters.alpha) * r.r_p);
    log_ratio = constant<V>(kLn2) * (min(V{}, at.gap) - log2(mix));
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
    return r.top * r.r_q * fma(w, log_ratio - share, -w_sum_g);
  }
};

template <class V> struct AlphaBeta : Terms<V> {
  static constexpr bool kTwoSweeps = true;
  using Terms<V>::Terms;
  using Terms<V>::parameters;
  // p^(α+β), q^(α+β) and p^α·q^β, each over the first result.
  ADAKD_INLINE V powers(const Entry<V>& at, V& p_ab, V& q_ab, V& mixed) const {
    const V alpha = parameters.alpha, beta = parameters.beta, both = alpha + beta, one = constant<V>(1.0);
    const Mask<V> q_above = at.gap > 0;
    const V low = exp2(-both * absolute(at.gap));
    mixed = exp2(q_above ? -alpha * at.gap : beta * at.gap);
    p_ab = q_above ? low : one;
    q_ab = q_above ? one : low;
    return exp2(both * max(at.log_q, at.log_p));
  }
  ADAKD_INLINE void terms(const Entry<V>& at, V& f, V& g) const {
    const V alpha = parameters.alpha, beta = parameters.beta, one = constant<V>(1.0);
    V p_ab, q_ab, mixed;
    const V scale = powers(at, p_ab, q_ab, mixed);
    f = scale * fma(alpha, p_ab - mixed, beta * (q_ab - mixed)) * (one / (alpha * beta * (alpha + beta)));
    g = scale * (q_ab - mixed) * (one / alpha);
  }
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    V p_ab, q_ab, mixed;
    const V scale = powers(at, p_ab, q_ab, mixed);
    return fma(w * (constant<V>(1.0) / parameters.alpha), scale * (q_ab - mixed), -w_sum_g * exp2(at.log_q));
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
