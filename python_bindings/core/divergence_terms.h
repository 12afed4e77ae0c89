// The divergences, entry by entry: f and g of docs/maths.md, section 3, and the gradient of equation (10).
//
// A divergence is a class with
//   terms(at): its summand and g = q ∂f/∂q, needed by divergences of two sweeps only;
//   gradient(at, w, w_sum_g): w·(g - q·Σg), with w_sum_g = w·Σg.
// Where terms() computes most of what the gradient takes, the class has instead (kKeeps)
//   kept(at): that one number of an entry, which terms() gives too, bit by bit;
//   gradient(q, kept, w, w_sum_g).
// V is a step or a vector of entries, or double for the peak alone. Logarithms are to base 2. The larger of p and q is taken out
// of every mixture, so that log-ratios of masses that underflow stay finite and everything is exactly 0 at p = q.
#pragma once

#include "rows.h"

namespace adakd {
namespace ADAKD_ISA {

// α and β in the forms that the formulas take. rest_of_x is 1 - x. The larger of the two is computed from the rounded
// smaller one, so that neither loses digits and both add up to 1: else the divergence would not be 0 at p = q.
template <class V> struct Parameters {
  V alpha, rest_of_alpha, beta, rest_of_beta;
  V alpha_plus_beta;
  V nearest, remainder;  // the integer next to α + β, and α + β less that integer
  V per_alpha;           // 1/α
  bool lopsided;         // one weight of the mixture is below 0.01, so that the mixture is next to one of its parts
  V peak_sign{};         // for kSign: the sign of log2(q/p) at the peak

  Parameters(double alpha, double beta) {
    split(alpha, this->alpha, rest_of_alpha);
    split(beta, this->beta, rest_of_beta);
    alpha_plus_beta = constant<V>(alpha + beta);
    nearest = constant<V>(std::nearbyint(alpha + beta));
    remainder = constant<V>(alpha + beta - std::nearbyint(alpha + beta));
    per_alpha = constant<V>(1.0 / alpha);
    lopsided = is_lopsided(alpha) || is_lopsided(beta);
  }

  // The same rounded numbers for one entry in double. Parameters of more digits would shift the peak's terms against
  // those of the other entries.
  Parameters<double> in_double() const {
    Parameters<double> x(0.0, 0.0);
    x.alpha = alpha[0], x.rest_of_alpha = rest_of_alpha[0], x.beta = beta[0], x.rest_of_beta = rest_of_beta[0];
    x.alpha_plus_beta = alpha_plus_beta[0], x.nearest = nearest[0], x.remainder = remainder[0];
    x.per_alpha = per_alpha[0], x.lopsided = lopsided;
    return x;
  }

 private:
  static void split(double x, V& weight, V& rest) {
    weight = constant<V>(x);
    rest = constant<V>(1.0 - x);
    if (0.5 < x && x < 1.0) weight = constant<V>(1.0) - rest;
    if (x <= 0.5) rest = constant<V>(1.0) - weight;
  }
  static bool is_lopsided(double x) { return x != 0.0 && !(0.01 < x && x < 0.99); }
};

// What the classes share: their traits, each false unless a class says otherwise.
template <class V> struct Terms {
  // f and g need the normalisers first, and so a second sweep.
  static constexpr bool kTwoSweeps = false;
  // g leaves out the term q, which cancels in (10) if all entries are finite. The q of those that are not comes off Σg.
  static constexpr bool kWithoutQ = false;
  // g depends on the sign of the log-ratio only. terms() and gradient() add c·q to g, with the peak's c of
  // -½·peak_sign.
  static constexpr bool kSign = false;
  // g grows with the log-ratio, so that an infinite log-ratio or an overflow shows in the gradient.
  static constexpr bool kUnbounded = false;
  // f and g take logarithms of a mixture of q and p.
  static constexpr bool kMixture = false;
  // The gradient takes what terms() computes besides f and g (above).
  static constexpr bool kKeeps = false;

  const Parameters<Vector<V>>& parameters;
  explicit Terms(const Parameters<Vector<V>>& parameters) : parameters(parameters) {}
  // The least power to which the terms raise a mass.
  static double least_power(double, double) { return 1.0; }
  // The derivative of Σf over some entries in a shift of their log2(q/p) alone, at Σf = f, Σg = g, Σq = q.
  static double slope(double, double, double) { return 0.0; }
};

// use(parameters), where the compiler knows `lopsided` and makes a loop for either value. A branch inside one loop
// would cost more than the second loop.
template <class Divergence, class V, class Use> ADAKD_INLINE auto unswitched(Parameters<V> parameters, Use use) {
  if (Divergence::kMixture && parameters.lopsided) return use(parameters);
  parameters.lopsided = false;
  return use(parameters);
}

// An entry: log2 q, log2 p and their difference.
template <class V> struct Entry {
  V log_q, log_p, gap;
};

// What terms() gives of an entry. `kept` is 0 where the class keeps nothing.
template <class V> struct Summands {
  V f, g, kept;
};

// The larger of p and q, and p and q over it: one of the ratios is 1.
template <class V> struct Ratios {
  V top, r_p, r_q;

  ADAKD_INLINE explicit Ratios(const Entry<V>& at) {
    const V one = constant<V>(1.0), low = exp2(minus_absolute(at.gap));
    const Mask<V> q_above = at.gap > V{};
    top = mass_of(max(at.log_q, at.log_p));
    r_p = select(q_above, low, one);
    r_q = select(q_above, one, low);
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

// log2(p/m) and log2(q/m) for m = weight_p·p + weight_q·q, from gap = log2(q/p) and mix, m over the larger of p and q.
template <class V> struct LogsOverMixture {
  V p, q;

  ADAKD_INLINE LogsOverMixture(V gap, V mix, V weight_p, V weight_q, bool lopsided) {
    const V log_mix = log2(mix);
    p = min(V{}, -gap) - log_mix;
    q = min(V{}, gap) - log_mix;
    if (!lopsided) return;
    // Where m is next to its heavy part, that part's logarithm is next to 0 and the one above has few digits. It is
    // computed as -log2(1 + x) from x = light·(light part/heavy part - 1), which is small and has all its digits; the
    // second summand of of_heavy makes up for the rounding of 1 + x.
    const V one = constant<V>(1.0), most = constant<V>(100.0);  // 2^100 is far beyond what counts as near
    const Mask<V> heavy_q = weight_q > weight_p;
    const V light = min(weight_p, weight_q), log_over_heavy = select(heavy_q, -gap, gap);
    const V over_heavy = exp2(min(most, log_over_heavy)), x = light * (over_heavy - one), sum = one + x;
    const V of_heavy = -(log2(sum) + constant<V>(kLog2e) * (x - (sum - one)));
    const V of_light = log_over_heavy + of_heavy;
    const Mask<V> near = light * over_heavy <= one;
    p = select(near, select(heavy_q, of_light, of_heavy), p);
    q = select(near, select(heavy_q, of_heavy, of_light), q);
  }
};

// Σ p·log(p/q): g = -p.
template <class V> struct ForwardKL : Terms<V> {
  using Terms<V>::Terms;
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    return -fma(w, mass_of(at.log_p), w_sum_g * mass_of(at.log_q));
  }
};

// Σ q·log(q/p): g = q·log(q/p), without the term q, which cancels in (10).
template <class V> struct ReverseKL : Terms<V> {
  static constexpr bool kUnbounded = true;
  using Terms<V>::Terms;
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    return weighted(mass_of(at.log_q), w * constant<V>(kLn2), at.gap, w_sum_g);
  }
};

// The sum of both.
template <class V> struct Jeffreys : Terms<V> {
  static constexpr bool kUnbounded = true;
  using Terms<V>::Terms;
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    return fma(-w, mass_of(at.log_p), weighted(mass_of(at.log_q), w * constant<V>(kLn2), at.gap, w_sum_g));
  }
};

// 1 - Σ √(pq): g = -½·√(pq).
template <class V> struct Hellinger : Terms<V> {
  using Terms<V>::Terms;
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    const V half = constant<V>(0.5), root_q = mass_of(half * at.log_q), root_p = mass_of(half * at.log_p);
    return -root_q * fma(half * w, root_p, w_sum_g * root_q);
  }
};

// ½ Σ |p - q|: g = ½·q·sign(q - p), and with c·q of the peak ½·q·(sign(q - p) - peak_sign).
template <class V> struct TotalVariation : Terms<V> {
  static constexpr bool kTwoSweeps = true, kSign = true;
  using Terms<V>::Terms;
  static ADAKD_INLINE V sign(const Entry<V>& at) {
    const V one = constant<V>(1.0), zero = V{};
    return select(at.gap > zero, one, select(at.gap < zero, -one, at.gap - at.gap));  // 0 - 0, or NaN - NaN
  }
  ADAKD_INLINE Summands<V> terms(const Entry<V>& at) const {
    const Ratios<V> r(at);
    const V half_top = constant<V>(0.5) * r.top;
    return {half_top * absolute(r.r_p - r.r_q), half_top * r.r_q * (sign(at) - this->parameters.peak_sign), V{}};
  }
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    return mass_of(at.log_q) * fma(constant<V>(0.5) * w, sign(at) - this->parameters.peak_sign, -w_sum_g);
  }
};

// Σ β·p·log(p/m) + (1 - β)·q·log(q/m), m = β·p + (1 - β)·q: g = (1 - β)·q·log(q/m). Kept: log2(q/m).
template <class V> struct JensenShannon : Terms<V> {
  static constexpr bool kTwoSweeps = true, kMixture = true, kKeeps = true;
  using Terms<V>::Terms;
  using Terms<V>::parameters;
  ADAKD_INLINE LogsOverMixture<V> logs(const Entry<V>& at, const Ratios<V>& r) const {
    const V mix = fma(parameters.beta, r.r_p, parameters.rest_of_beta * r.r_q);
    return {at.gap, mix, parameters.beta, parameters.rest_of_beta, parameters.lopsided};
  }
  ADAKD_INLINE Summands<V> terms(const Entry<V>& at) const {
    const Ratios<V> r(at);
    const LogsOverMixture<V> log = logs(at, r);
    const V scale = constant<V>(kLn2) * r.top, q_part = parameters.rest_of_beta * r.r_q * log.q;
    return {scale * fma(parameters.beta * r.r_p, log.p, q_part), scale * q_part, log.q};
  }
  ADAKD_INLINE V kept(const Entry<V>& at) const { return logs(at, Ratios<V>(at)).q; }
  ADAKD_INLINE V gradient(V q, V kept, V w, V w_sum_g) const {
    return weighted(q, w * parameters.rest_of_beta * constant<V>(kLn2), above_overflow(kept), w_sum_g);
  }
};

// Σ p·log(p/m), m = α·p + (1 - α)·q: g = -(1 - α)·p·q/m. Kept: p/m.
template <class V> struct SkewForwardKL : Terms<V> {
  static constexpr bool kTwoSweeps = true, kMixture = true, kKeeps = true;
  using Terms<V>::Terms;
  using Terms<V>::parameters;
  static double slope(double, double g, double) { return kLn2 * g; }
  ADAKD_INLINE V mixture(const Ratios<V>& r) const {
    return fma(parameters.alpha, r.r_p, parameters.rest_of_alpha * r.r_q);
  }
  ADAKD_INLINE Summands<V> terms(const Entry<V>& at) const {
    const Ratios<V> r(at);
    const V rest = parameters.rest_of_alpha, mix = mixture(r), p_over_mix = r.r_p / mix;
    const V log_p = LogsOverMixture<V>(at.gap, mix, parameters.alpha, rest, parameters.lopsided).p;
    return {constant<V>(kLn2) * (r.top * r.r_p) * log_p, -rest * (r.top * r.r_q) * p_over_mix, p_over_mix};
  }
  ADAKD_INLINE V kept(const Entry<V>& at) const {
    const Ratios<V> r(at);
    return r.r_p / mixture(r);
  }
  ADAKD_INLINE V gradient(V q, V kept, V w, V w_sum_g) const {
    return -q * fma(w * parameters.rest_of_alpha, kept, w_sum_g);
  }
};

// Σ q·log(q/m), m = α·q + (1 - α)·p: g = q·(log(q/m) - α·q/m), without the term q. Kept: g/q.
template <class V> struct SkewReverseKL : Terms<V> {
  static constexpr bool kTwoSweeps = true, kWithoutQ = true, kMixture = true, kKeeps = true;
  using Terms<V>::Terms;
  using Terms<V>::parameters;
  static double slope(double f, double g, double q) { return kLn2 * (q + g - f); }
  // log(q/m) and α·q/m: g is q·(their difference).
  ADAKD_INLINE void parts(const Entry<V>& at, const Ratios<V>& r, V& log_ratio, V& q_of_mixture) const {
    const V mix = fma(parameters.alpha, r.r_q, parameters.rest_of_alpha * r.r_p);
    const LogsOverMixture<V> log(at.gap, mix, parameters.rest_of_alpha, parameters.alpha, parameters.lopsided);
    log_ratio = constant<V>(kLn2) * log.q;
    q_of_mixture = parameters.alpha * (r.r_q / mix);
  }
  ADAKD_INLINE Summands<V> terms(const Entry<V>& at) const {
    const Ratios<V> r(at);
    const V q = r.top * r.r_q;
    V log_ratio, q_of_mixture;
    parts(at, r, log_ratio, q_of_mixture);
    const V f = q * log_ratio;
    return {f, fma(-q, q_of_mixture, f), log_ratio - q_of_mixture};
  }
  ADAKD_INLINE V kept(const Entry<V>& at) const {
    V log_ratio, q_of_mixture;
    parts(at, Ratios<V>(at), log_ratio, q_of_mixture);
    return log_ratio - q_of_mixture;
  }
  ADAKD_INLINE V gradient(V q, V kept, V w, V w_sum_g) const {
    return weighted(q, w, above_overflow(kept), w_sum_g);
  }
};

// Σ (α·p^(α+β) + β·q^(α+β) - (α+β)·p^α·q^β)/(αβ(α+β)): g = (q^(α+β) - p^α·q^β)/α. Kept: g.
template <class V> struct AlphaBeta : Terms<V> {
  static constexpr bool kTwoSweeps = true, kKeeps = true;
  using Terms<V>::Terms;
  using Terms<V>::parameters;
  static double least_power(double alpha, double beta) { return min(1.0, alpha + beta); }
  // x·(α + β). A rounded α + β would be an error of all powers alike, which does not average out over the vocabulary.
  // Its nearest integer is exact, and the remainder has more digits than the sum.
  ADAKD_INLINE V times_alpha_plus_beta(V x) const { return fma(parameters.nearest, x, parameters.remainder * x); }

  // p^(α+β), q^(α+β) and p^α·q^β, each over the larger of the first two, which is the return value.
  ADAKD_INLINE V powers(const Entry<V>& at, V& p_ab, V& q_ab, V& mixed) const {
    const V one = constant<V>(1.0);
    const Mask<V> q_above = at.gap > V{};
    const V low = exp2(times_alpha_plus_beta(minus_absolute(at.gap)));
    mixed = exp2(select(q_above, -parameters.alpha * at.gap, parameters.beta * at.gap));
    p_ab = select(q_above, low, one);
    q_ab = select(q_above, one, low);
    // The remainder may be negative: of -inf, the two terms of times_alpha_plus_beta would then give NaN.
    return exp2(times_alpha_plus_beta(max(constant<V>(-1.0e4), max(at.log_q, at.log_p))));
  }
  ADAKD_INLINE Summands<V> terms(const Entry<V>& at) const {
    const V alpha = parameters.alpha, beta = parameters.beta, one = constant<V>(1.0);
    V p_ab, q_ab, mixed;
    const V scale = powers(at, p_ab, q_ab, mixed), g = g_of(scale, q_ab, mixed);
    return {scale * fma(alpha, p_ab - mixed, beta * (q_ab - mixed)) *
                (one / (alpha * beta * parameters.alpha_plus_beta)),
            g, g};
  }
  ADAKD_INLINE V g_of(V scale, V q_ab, V mixed) const { return scale * (q_ab - mixed) * parameters.per_alpha; }
  ADAKD_INLINE V kept(const Entry<V>& at) const {
    V p_ab, q_ab, mixed;
    const V scale = powers(at, p_ab, q_ab, mixed);
    return g_of(scale, q_ab, mixed);
  }
  ADAKD_INLINE V gradient(V q, V kept, V w, V w_sum_g) const { return fma(w, kept, -w_sum_g * q); }
};

// For a token that the loss selects for its cross-entropy alone.
template <class V> struct None : Terms<V> {
  using Terms<V>::Terms;
  ADAKD_INLINE V gradient(const Entry<V>&, V, V) const { return V{}; }
};

// A divergence's class as a value: Tag<D>::Of<V> is D<V>.
template <template <class> class D> struct Tag {
  template <class V> using Of = D<V>;
};

// Calls use(tag) with the tag of the divergence's class. The list gives every divergence its case, so `use` is always
// called.
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
