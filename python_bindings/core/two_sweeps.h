// The divergences whose summands are not linear in the masses: the first sweep finds the normalisers, the second Σf and
// Σg (docs/maths.md, section 5.4).
#pragma once

#include "divergence_terms.h"
#include "kl.h"

namespace adakd {
namespace ADAKD_ISA {

// The first sweep: normalisers and peak.
using NormalizerFold = KLFold<false, false>;

// The two normalisers of a row as the second sweep and the backward take them, from the stored (max, sum) pairs: log2 q
// of an entry is (s - m_s)·scale - c_s. Both find the same bits of every log-ratio, so that total variation has the same
// sign of one next to 0, and what the second sweep keeps is what the backward would compute.
struct LogNormalizers {
  double scale, m_s, c_s, m_t, c_t;

  static LogNormalizers from(double scale, double m_s, double l_s, double m_t, double l_t) {
    return {scale, m_s, std::log2(l_s), m_t, std::log2(l_t)};
  }
};

// The same in every lane of a vector.
template <class V> struct Frame {
  V scale, m_s, m_t, c_s, c_t;
  V c_gap;  // c_s - c_t, rounded once: an error of it shifts all log-ratios of the row alike

  explicit Frame(const LogNormalizers& x)
      : scale(constant<V>(x.scale)), m_s(constant<V>(x.m_s)), m_t(constant<V>(x.m_t)), c_s(constant<V>(x.c_s)),
        c_t(constant<V>(x.c_t)), c_gap(constant<V>(x.c_s - x.c_t)) {}

  // log2 q alone.
  template <class X> ADAKD_INLINE X log_q(const X& s) const { return rounded_once(X(s - X(m_s)), X(scale), X(-c_s)); }

  // log2 q, log2 p and log2(q/p) from logits. Each is rounded once: c is often small beside the product, and rounding
  // the product first would shift all entries of a row the same way. The gap comes from the logits, not from log2 q -
  // log2 p, which loses it where both are large.
  template <bool kGuarded, class X> ADAKD_INLINE Entry<X> entry(const X& s, const X& t) const {
    const X x = below<kGuarded, X>(s, m_s), y = below<kGuarded, X>(t, m_t);
    return {rounded_once(x, scale, -c_s), rounded_once(y, scale, -c_t),
            bounded<kGuarded>(rounded_once(x - y, scale, -c_gap))};
  }

 private:
  // A log-ratio in double stays finite, because it is multiplied by masses of 0.
  template <bool kGuarded, class X> static ADAKD_INLINE X bounded(const X& x) {
    if constexpr (kGuarded && kIsDouble<V>) return min(X(broadcast<V>(-kLowest)), max(X(broadcast<V>(kLowest)), x));
    return x;
  }
};

// The second sweep: Σf and Σg over the entries beside the peak, with g as the divergence's terms() gives it. With
// kConstant it is Σ (g + c·q): where g and c·q nearly cancel in every entry, rounded sums of either would not.
template <class D, bool kConstant = false> struct TermsFold {
  static constexpr bool kPeak = false;  // the first sweep has found it
  static constexpr bool kWithC = kConstant || D::template Of<double>::kSign;  // whether g is g + c·q
  static constexpr bool kWithoutQ = D::template Of<double>::kWithoutQ;

  LogNormalizers normalizers;
  double alpha, beta;
  double c = 0.0;  // with kWithC
  double f = 0.0, g = 0.0;
  // Where to put the number that each entry keeps for the gradient, if anywhere, and how many lie there: those from the
  // beginning of the row to the first block that is not folded in floats without guards. Within a step they lie in the
  // order of its vectors.
  float* kept = nullptr;
  int64_t kept_entries = 0;

  TermsFold(const LogNormalizers& normalizers, double alpha, double beta)
      : normalizers(normalizers), alpha(alpha), beta(beta) {}

  // For kSign: takes the sign that the backward will find at the peak, from which c comes. A log-ratio within the rounding
  // of the sums takes the sign that the stored normalisers give. For equal rows all signs are then the same.
  template <class V> void take_sign(const NormalizerFold& first) {
    if (!first.peak.finite()) return;
    const double peak_gap = first.masses.gap;
    const bool known = std::fabs(peak_gap) > -8.0 * std::numeric_limits<Scalar<V>>::epsilon() * first.masses.log_q;
    const V s = constant<V>(first.peak.s), t = constant<V>(first.peak.t);
    const double gap = known ? peak_gap : Frame<V>(normalizers).template entry<true>(s, t).gap[0];
    c = gap > 0.0 ? -0.5 : gap < 0.0 ? 0.5 : 0.0;
  }

  // Whether the terms of this logit are 0 in fp32: its masses, to the least power that the terms raise them to, are
  // below 2^-400.
  bool has_no_mass(double logit) const {
    constexpr double kNone = -400.0;
    const double log_q = (logit - normalizers.m_s) * normalizers.scale;
    const double log_p = (logit - normalizers.m_t) * normalizers.scale;
    return (log_q > log_p ? log_q : log_p) * D::template Of<double>::least_power(alpha, beta) < kNone;
  }

  template <bool kGuarded, class V, class T> Added add(const Block<T>& block) {
    Parameters<V> parameters(alpha, beta);
    parameters.peak_sign = constant<V>(-2.0 * c);
    return unswitched<typename D::template Of<V>>(parameters, [&](const Parameters<V>& x) ADAKD_INLINE_LAMBDA {
      return add<kGuarded, V>(block, x);
    });
  }

  template <bool kGuarded, class V, class T>
  ADAKD_INLINE Added add(const Block<T>& block, const Parameters<V>& parameters) {
    const V c_here = constant<V>(c), c_lost = constant<V>((kWithC ? c : 0.0) - (kWithoutQ ? 1.0 : 0.0));
    const Frame<V> frame(normalizers);
    Total<V> total_f, total_g;
    ChainSum<V> f_sum, g_sum;
    ChainSum<V> check;  // 0, or NaN once a log-ratio is not finite
    if (kGuarded) kept = nullptr;
    float* next = kept == nullptr ? nullptr : kept + kept_entries;
    const auto add = [&](const auto& s, const auto& t, int i) ADAKD_INLINE_LAMBDA {
      using X = std::decay_t<decltype(s)>;
      using Divergence = typename D::template Of<X>;
      const X minus_infinity = broadcast<V>(-kInfinity), zero = V{};
      const Entry<X> at = frame.template entry<kGuarded>(s, t);
      const Summands<X> here = Divergence(parameters).terms(at);
      X f_here = here.f, g_here = here.g;
      if constexpr (Divergence::kKeeps && !kGuarded && !kIsDouble<V>) {
        if (next != nullptr) {
          store<V>(next, here.kept);
          next += kLanes<X>;
        }
      }
      if constexpr (kConstant && !Divergence::kSign) g_here = g_here + c_here * mass_of(at.log_q);
      X gap = at.gap;
      if (kGuarded) {
        const Mask<X> finite = (s != minus_infinity) & (t != minus_infinity);
        // An entry that is not finite has g = 0, but its q still enters Σg: as -q where terms() leaves the term q out
        // of g, as c·q where c·q is added to g.
        X lost = zero;
        if constexpr (kWithC || kWithoutQ) lost = c_lost * mass_of(at.log_q);
        f_here = select(finite, f_here, zero);
        g_here = select(finite, g_here, lost);
        gap = select(finite, gap, zero);
      }
      f_sum.add(f_here, i);
      g_sum.add(g_here, i);
      if constexpr (!kIsDouble<V>) check.add_product(gap, zero, i);
    };
    for_each_step<V>(block, add, [&]() ADAKD_INLINE_LAMBDA {
      total_f.take(f_sum);
      total_g.take(g_sum);
      return true;
    });
    if (any(check.first + check.second != V{})) return Added::kRetry;
    f += total_f.value();
    g += total_g.value();
    if (kept != nullptr) kept_entries += block.n;
    return Added::kYes;
  }

  // D, Σg and the peak's gradient from these sums and the peak's own terms, which take the parameters as vectors of V
  // do.
  template <class V> RowResult result(const NormalizerFold& first) const {
    using Divergence = typename D::template Of<double>;
    const NormalizerFold::PeakMasses& m = first.masses;
    const double q = m.a / m.l_s;
    RowResult r;
    r.d = f;
    if (!first.peak.finite()) {
      r.sum_g = kWithoutQ ? g - q : g;
      return r;
    }
    const Parameters<double> parameters = Parameters<V>(alpha, beta).in_double();
    const auto terms = [&](double gap) { return Divergence(parameters).terms({m.log_q, m.log_q - gap, gap}); };
    r.d += terms(m.gap).f;
    if (kWithC) {
      r.set_gradient(first.peak.index, q, c, g);
    } else {
      const double gap = gap_of<V>(first.peak), peak_c = -terms(gap).g / q;
      r.d += Divergence::slope(f, g, m.other_q) * (m.gap - gap);
      r.set_gradient(first.peak.index, q, peak_c, g + peak_c * m.other_q);
    }
    return r;
  }

 private:
  // The peak's log-ratio from the normalisers of the other entries, which have fewer digits than the first sweep's. g of
  // the peak takes it, because a shift of the others' log-ratios against the peak's would be an error of its gradient. f
  // takes the one with all digits, and result() makes up for the shift in the others' f.
  template <class V> double gap_of(const Peak& peak) const {
    const double far = apart(apart(peak.s, normalizers.m_s), apart(peak.t, normalizers.m_t)) * normalizers.scale;
    return apart(far, static_cast<Scalar<V>>(normalizers.c_s - normalizers.c_t));
  }
};

}  // namespace ADAKD_ISA
}  // namespace adakd
