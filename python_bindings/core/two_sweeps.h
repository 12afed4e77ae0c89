// Σf and Σg of the divergences whose summands are not linear in the masses, from the normalisers: the second sweep
// (docs/maths.md, section 5.4).
#pragma once

#include "divergence_terms.h"
#include "kl.h"

namespace adakd {
namespace ADAKD_ISA {

// What a sweep knows of a row's normalisers. log2 q of an entry is (z - m)·scale - c.
struct Normalized {
  double scale, m_s, c_s, m_t, c_t;
  double c_gap;  // c_s - c_t, with digits of its own

  // From the normalisers as they are kept, and rounded as vectors of V have it.
  template <class V> static Normalized kept(double scale, double m_s, double sum_s, double m_t, double sum_t) {
    const Scalar<V> c_s = static_cast<Scalar<V>>(std::log2(sum_s)), c_t = static_cast<Scalar<V>>(std::log2(sum_t));
    return {scale, m_s, c_s, m_t, c_t, c_s - c_t};
  }
};

template <class V> struct Frame {
  V scale, m_s, m_t, c_s, c_t, c_gap;

  explicit Frame(const Normalized& x)
      : scale(constant<V>(x.scale)), m_s(constant<V>(x.m_s)), m_t(constant<V>(x.m_t)), c_s(constant<V>(x.c_s)),
        c_t(constant<V>(x.c_t)), c_gap(constant<V>(x.c_gap)) {}

  template <bool kGuarded> ADAKD_INLINE Entry<V> entry(V zs, V zt) const {
    const V from_s = difference<kGuarded>(zs, m_s), from_t = difference<kGuarded>(zt, m_t);
    return {rounded_once(from_s, scale, -c_s), rounded_once(from_t, scale, -c_t),
            bounded<kGuarded>(rounded_once(from_s - from_t, scale, -c_gap))};
  }

 private:
  // A log-ratio in double, whose product with 0 has to be 0.
  template <bool kGuarded> static ADAKD_INLINE V bounded(V x) {
    if constexpr (kGuarded && sizeof(Scalar<V>) == 8) return min(broadcast<V>(-kLowest), max(broadcast<V>(kLowest), x));
    return x;
  }
};

template <class D> struct TermsFold {
  static constexpr bool kPeak = false;

  Normalized normalized;
  double alpha, beta;
  double own_sign = 0.0;  // kSign: that of the peak's log-ratio
  double f = 0.0, g = 0.0;

  TermsFold(const Normalized& normalized, double alpha, double beta) : normalized(normalized), alpha(alpha), beta(beta) {}

  // Puts the peak and the other entries on one scale, as vectors of V have it.
  template <class V> void align_with_peak(const NormalizerFold& first) {
    if (!first.peak.counts()) return;
    const double log_ratio = first.masses.log_ratio;
    if (D::template Of<double>::kSign) {
      // The backward has to find the signs that are added up here, from the normalisers that it knows: so has the peak
      // where its log-ratio is within the rounding of the sums. With equal rows, all signs are then the same.
      const bool known = std::fabs(log_ratio) > -8.0 * std::numeric_limits<Scalar<V>>::epsilon() * first.masses.log_q;
      const V s = broadcast<V>(static_cast<Scalar<V>>(first.peak.s)), t = broadcast<V>(static_cast<Scalar<V>>(first.peak.t));
      const double gap = known ? log_ratio : Frame<V>(normalized).template entry<true>(s, t).gap[0];
      own_sign = gap > 0.0 ? 1.0 : gap < 0.0 ? -1.0 : 0.0;
      return;
    }
    // A shift of all log-ratios against the peak's would be an error of the peak's gradient.
    const double from_s = first.peak.s - normalized.m_s, from_t = first.peak.t - normalized.m_t;
    constexpr double kFar = 1.0e3;  // c_gap would be a small difference of two large numbers
    if (std::fabs(log_ratio) < kFar) normalized.c_gap = (from_s - from_t) * normalized.scale - log_ratio;
  }

  bool has_no_mass(double logit) const {
    constexpr double kNone = -400.0;
    const double log_q = (logit - normalized.m_s) * normalized.scale, log_p = (logit - normalized.m_t) * normalized.scale;
    return (log_q > log_p ? log_q : log_p) * D::template Of<double>::least_power(alpha, beta) < kNone;
  }

  template <bool kGuarded, class V, class T> Added add(const Block<T>& block) {
    Parameters<V> parameters(alpha, beta);
    parameters.own_sign = constant<V>(own_sign);
    return unswitched<typename D::template Of<V>>(parameters, [&](const Parameters<V>& x) ADAKD_INLINE_LAMBDA {
      return add<kGuarded, V>(block, x);
    });
  }

  template <bool kGuarded, class V, class T> ADAKD_INLINE Added add(const Block<T>& block, const Parameters<V>& parameters) {
    using Divergence = typename D::template Of<V>;
    const V own_c = constant<V>(-0.5 * own_sign);
    const Divergence divergence(parameters);
    const Frame<V> frame(normalized);
    const V minus_infinity = broadcast<V>(-kInfinity), zero = V{};
    Total<V> total_f, total_g;
    Pair<V> sum_f{}, sum_g{}, finite{};  // finite: 0, or NaN once a log-ratio is not
    const auto entry = [&](V zs, V zt, V& ff, V& gg, V& finite) ADAKD_INLINE_LAMBDA {
      const Entry<V> at = frame.template entry<kGuarded>(zs, zt);
      V f_here, g_here;
      divergence.terms(at, f_here, g_here);
      V check = at.gap;
      if (kGuarded) {
        const Mask<V> kept = (zs != minus_infinity) & (zt != minus_infinity);
        // What (c - κ)·q comes to: κ = 1 where g leaves out the term q, c where the terms have it already.
        const V lost = Divergence::kWithoutQ ? -exp2(at.log_q) : Divergence::kSign ? own_c * exp2(at.log_q) : zero;
        f_here = kept ? f_here : zero;
        g_here = kept ? g_here : lost;
        check = kept ? check : zero;
      }
      ff += f_here;
      gg += g_here;
      if constexpr (sizeof(Scalar<V>) == 4) finite = fma(check, zero, finite);
    };
    for_each_pair<V>(
        block,
        [&](const Pair<V>& zs, const Pair<V>& zt) ADAKD_INLINE_LAMBDA {
          entry(zs.first, zt.first, sum_f.first, sum_g.first, finite.first);
          entry(zs.second, zt.second, sum_f.second, sum_g.second, finite.second);
        },
        [&]() ADAKD_INLINE_LAMBDA {
          total_f.take(sum_f);
          total_g.take(sum_g);
        });
    if (any(finite.first + finite.second != zero)) return Added::kNotInThisType;
    f += total_f.value();
    g += total_g.value();
    return Added::kYes;
  }

  // D and the gradient's numbers, with the peak's own terms, from parameters rounded as in vectors of V.
  template <class V> RowResult result(const NormalizerFold& first) const {
    using Divergence = typename D::template Of<double>;
    const NormalizerFold::Masses& m = first.masses;
    const double q = m.peak_s / m.all_s;
    RowResult r;
    r.d = f;
    if (!first.peak.counts()) {
      r.sum_g = Divergence::kWithoutQ ? g - q : g;
      return r;
    }
    const Parameters<double> parameters = Parameters<V>(alpha, beta).in_double();
    double own_f, own_g;
    Divergence(parameters).terms(Entry<double>{m.log_q, m.log_q - m.log_ratio, m.log_ratio}, own_f, own_g);
    r.d += own_f;
    if (Divergence::kSign) {
      r.set_gradient(first.peak.index, q, -0.5 * own_sign, g);
    } else {
      const double c = -own_g / q;
      r.set_gradient(first.peak.index, q, c, g + c * m.beside);
    }
    return r;
  }
};

}  // namespace ADAKD_ISA
}  // namespace adakd
