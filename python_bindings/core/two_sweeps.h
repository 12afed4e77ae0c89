// The divergences whose summands are not linear in the masses: the first sweep finds the normalisers, the second Σf and
// Σg (docs/maths.md, section 5.4).
#pragma once

#include "divergence_terms.h"
#include "kl.h"

namespace adakd {
namespace ADAKD_ISA {

// The first sweep: normalisers and peak.
using NormalizerFold = KLFold<false, false>;

// The two normalisers of a row as the second sweep and the backward take them: log2 q of an entry is (s - m_s)·scale -
// c_s.
struct LogNormalizers {
  double scale, m_s, c_s, m_t, c_t;
  // c_s - c_t. It is a number of its own because it may have more digits than the difference
  // (TermsFold::align_with_peak).
  double c_gap;

  // From the stored (max, sum) pairs, with c rounded to the type of V's lanes. Forward and backward then round alike,
  // and total variation finds the same sign of a log-ratio next to 0 in both.
  template <class V> static LogNormalizers from(double scale, double m_s, double l_s, double m_t, double l_t) {
    const Scalar<V> c_s = static_cast<Scalar<V>>(std::log2(l_s)), c_t = static_cast<Scalar<V>>(std::log2(l_t));
    return {scale, m_s, c_s, m_t, c_t, c_s - c_t};
  }
};

// The same in every lane of a vector.
template <class V> struct Frame {
  V scale, m_s, m_t, c_s, c_t, c_gap;

  explicit Frame(const LogNormalizers& x)
      : scale(constant<V>(x.scale)), m_s(constant<V>(x.m_s)), m_t(constant<V>(x.m_t)), c_s(constant<V>(x.c_s)),
        c_t(constant<V>(x.c_t)), c_gap(constant<V>(x.c_gap)) {}

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

  TermsFold(const LogNormalizers& normalizers, double alpha, double beta)
      : normalizers(normalizers), alpha(alpha), beta(beta) {}

  // Makes the log-ratios of the other entries agree with the peak's, which the first sweep knows with more digits.
  // Vectors of V will take them.
  template <class V> void align_with_peak(const NormalizerFold& first) {
    if (!first.peak.finite()) return;
    const double peak_gap = first.masses.gap;
    if (D::template Of<double>::kSign) {
      // The backward finds the signs again from the stored normalisers. So a peak whose log-ratio is within the
      // rounding of the sums takes the sign that these give. For equal rows all signs are then the same.
      const bool known = std::fabs(peak_gap) > -8.0 * std::numeric_limits<Scalar<V>>::epsilon() * first.masses.log_q;
      const V s = constant<V>(first.peak.s), t = constant<V>(first.peak.t);
      const double gap = known ? peak_gap : Frame<V>(normalizers).template entry<true>(s, t).gap[0];
      c = gap > 0.0 ? -0.5 : gap < 0.0 ? 0.5 : 0.0;
      return;
    }
    // A shift of all log-ratios against the peak's does not average out over the vocabulary, and would be an error of
    // the peak's gradient. So c_gap becomes what the peak's log-ratio asks for, unless that would be a small difference
    // of two large numbers.
    const double x = first.peak.s - normalizers.m_s, y = first.peak.t - normalizers.m_t;
    constexpr double kFar = 1.0e3;
    if (std::fabs(peak_gap) < kFar) normalizers.c_gap = (x - y) * normalizers.scale - peak_gap;
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
    const auto add = [&](const auto& s, const auto& t, int i) ADAKD_INLINE_LAMBDA {
      using X = std::decay_t<decltype(s)>;
      using Divergence = typename D::template Of<X>;
      const X minus_infinity = broadcast<V>(-kInfinity), zero = V{};
      const Entry<X> at = frame.template entry<kGuarded>(s, t);
      X f_here, g_here;
      Divergence(parameters).terms(at, f_here, g_here);
      if constexpr (kConstant && !Divergence::kSign) g_here = g_here + c_here * exp2(at.log_q);
      X gap = at.gap;
      if (kGuarded) {
        const Mask<X> finite = (s != minus_infinity) & (t != minus_infinity);
        // An entry that is not finite has g = 0, but its q still enters Σg: as -q where terms() leaves the term q out
        // of g, as c·q where c·q is added to g.
        X lost = zero;
        if constexpr (kWithC || kWithoutQ) lost = c_lost * exp2(at.log_q);
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
    double peak_f, peak_g;
    Divergence(parameters).terms(Entry<double>{m.log_q, m.log_q - m.gap, m.gap}, peak_f, peak_g);
    r.d += peak_f;
    if (kWithC) {
      r.set_gradient(first.peak.index, q, c, g);
    } else {
      const double peak_c = -peak_g / q;
      r.set_gradient(first.peak.index, q, peak_c, g + peak_c * m.other_q);
    }
    return r;
  }
};

}  // namespace ADAKD_ISA
}  // namespace adakd
