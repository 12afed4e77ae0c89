// Normalisers of two rows in one sweep and, for forward and reverse KL and their sum, the summed log-ratios
// (docs/maths.md, section 5.2).
//
// Sums run over all entries but the peak and are relative to two anchors, the peak's logit and a logit near the teacher's
// maximum. Logarithms are to base 2 until the result.
#pragma once

#include "rows.h"

namespace adakd {
namespace ADAKD_ISA {

// z - m. In double, which computes what the other types cannot hold, logits of the type's whole range stay finite.
template <bool kGuarded, class V> ADAKD_INLINE V difference(V z, V m) {
  if constexpr (kGuarded && sizeof(Scalar<V>) == 8) return max(broadcast<V>(kLowest), z - m);
  return z - m;
}

template <bool kForward, bool kReverse> struct KLFold {
  static constexpr bool kPeak = true, kRatios = kForward || kReverse;

  double scale;
  Side s{}, t{};                      // Σ of the masses; s is relative to the peak
  double keep_s = 0.0, keep_t = 0.0;  // those of entries that are -inf on no side
  double gap_s = 0.0, gap_t = 0.0;    // Σ q·gap, Σ p·gap over them, gap = (zs - s.anchor) - (zt - t.anchor)
  Peak peak{};
  double passing = -kInfinity;  // the logit of the new peak in a block that was not added

  // The masses of both rows, at the peak and elsewhere. finish() fills them in.
  struct Masses {
    double all_s = 0.0, all_t = 0.0;
    double beside = 0.0;  // Σ q but for the peak
    double peak_s = 0.0, peak_t = 0.0;
    double log_q = 0.0, log_ratio = 0.0;  // log2 q and log2(q/p) at the peak
  };
  Masses masses{};

  explicit KLFold(double scale) : scale(scale) {}

  struct Sums {
    double s, t, keep_s, keep_t, gap_s, gap_t;
    Maxima max;
    bool finite() const { return std::isfinite(s + t + gap_s + gap_t); }
  };

  template <bool kGuarded, class V, class T> Sums sums(const Block<T>& block) const {
    const V k = constant<V>(scale), m_s = constant<V>(s.origin()), m_t = constant<V>(t.origin()), zero = V{};
    const V minus_infinity = broadcast<V>(-kInfinity), one = constant<V>(1.0);
    Total<V> total_s, total_t, total_rs, total_rt, total_ks, total_kt;
    Pair<V> sum_s{}, sum_t{}, ratio_s{}, ratio_t{}, kept_s{}, kept_t{};
    V max_s = minus_infinity, max_t = minus_infinity;
    const auto entry = [&](V zs, V zt, V& ss, V& tt, V& rs, V& rt, V& ks, V& kt) ADAKD_INLINE_LAMBDA {
      max_s = max(max_s, zs);
      max_t = max(max_t, zt);
      const V from_s = difference<kGuarded>(zs, m_s), from_t = difference<kGuarded>(zt, m_t);
      const V a = exp2(from_s * k), b = exp2(from_t * k);
      // Sums by multiply-adds: AMD's units for additions are the busier ones here, with exp2's rounding and scaling.
      ss = fma(a, one, ss);
      tt = fma(b, one, tt);
      if constexpr (kRatios && kGuarded) {
        const Mask<V> kept = (zs != minus_infinity) & (zt != minus_infinity);
        const V a_kept = kept ? a : zero, b_kept = kept ? b : zero, gap = kept ? from_s - from_t : zero;
        ks += a_kept;
        kt += b_kept;
        rs = fma(a_kept, gap, rs);
        rt = fma(b_kept, gap, rt);
      } else if constexpr (kRatios) {
        const V gap = from_s - from_t;
        if (kReverse) rs = fma(a, gap, rs);
        if (kForward) rt = fma(b, gap, rt);
      }
    };
    for_each_pair<V>(
        block,
        [&](const Pair<V>& zs, const Pair<V>& zt) ADAKD_INLINE_LAMBDA {
          entry(zs.first, zt.first, sum_s.first, sum_t.first, ratio_s.first, ratio_t.first, kept_s.first, kept_t.first);
          entry(zs.second, zt.second, sum_s.second, sum_t.second, ratio_s.second, ratio_t.second, kept_s.second,
                kept_t.second);
        },
        [&]() ADAKD_INLINE_LAMBDA {
          total_s.take(sum_s);
          total_t.take(sum_t);
          if (kReverse || (kRatios && kGuarded)) total_rs.take(ratio_s);
          if (kForward || (kRatios && kGuarded)) total_rt.take(ratio_t);
          if (kRatios && kGuarded) total_ks.take(kept_s);
          if (kRatios && kGuarded) total_kt.take(kept_t);
        });
    Sums x{total_s.value(), total_t.value(), 0.0, 0.0, total_rs.value(), total_rt.value(),
           {max_lanes(max_s), max_lanes(max_t)}};
    x.keep_s = kRatios && kGuarded ? total_ks.value() : x.s;
    x.keep_t = kRatios && kGuarded ? total_kt.value() : x.t;
    return x;
  }

  template <bool kGuarded, class V, class T> Added add(const Block<T>& block) {
    if (!peak.exists() || t.anchor == -kInfinity) {
      const Maxima first = block_maxima<V>(block);
      raise_teacher(first.t);
      if (passes(first.s)) return Added::kNewPeak;
    }
    Sums x = sums<kGuarded, V>(block);
    const bool raised = raise_teacher(x.max.t);
    if (passes(x.max.s)) return Added::kNewPeak;
    if (raised) x = sums<kGuarded, V>(block);
    // Sums in double are what they are: NaN comes from the logits.
    if (!(kGuarded && sizeof(Scalar<V>) == 8) && !x.finite()) return Added::kNotInThisType;
    s.sum += x.s;
    t.sum += x.t;
    keep_s += x.keep_s;
    keep_t += x.keep_t;
    gap_s += x.gap_s;
    gap_t += x.gap_t;
    s.include(x.max.s);
    t.include(x.max.t);
    return Added::kYes;
  }

  bool has_no_mass(double logit) const { return s.has_no_mass(logit, scale) && t.has_no_mass(logit, scale); }

  bool passes(double logit) {
    if (!peak.passed_by(logit, scale)) return false;
    passing = logit;
    return true;
  }

  // Moves the teacher's anchor if it is too low for this logit; whether it moved.
  bool raise_teacher(double logit) {
    if (!t.too_low(logit, scale)) return false;
    shift_gaps(0.0, apart(t.origin(), logit));
    const double f = t.move(logit, scale);
    keep_t *= f;
    gap_t *= f;
    return true;
  }

  // The log-ratios of all entries so far, when the anchors move down by so much.
  void shift_gaps(double down_s, double down_t) {
    gap_s += keep_s == 0.0 ? 0.0 : keep_s * (down_s - down_t);
    gap_t += keep_t == 0.0 ? 0.0 : keep_t * (down_s - down_t);
  }

  // The former peak joins the other entries.
  void take_peak(const Peak& next) {
    shift_gaps(apart(s.origin(), next.s), 0.0);
    const double f = s.move(next.s, scale);
    keep_s *= f;
    gap_s *= f;
    if (peak.exists()) {
      const double a = s.mass(peak.s, scale), b = t.mass(peak.t, scale);
      s.sum += a;
      t.sum += b;
      if (peak.counts()) {
        keep_s += a;
        keep_t += b;
        gap_s += a * gap(peak);
        gap_t += b * gap(peak);
      }
    }
    peak = next;
    s.include(next.s);
    t.include(next.t);
  }

  double gap(const Peak& at) const { return apart(apart(at.s, s.origin()), apart(at.t, t.origin())); }

  Masses measure() const {
    Masses m;
    m.all_s = s.sum;
    m.all_t = t.sum;
    if (peak.exists()) {
      m.peak_s = 1.0;  // the anchor is its logit
      m.peak_t = t.mass(peak.t, scale);
      m.all_s += m.peak_s;
      m.all_t += m.peak_t;
      m.beside = s.sum / m.all_s;
    }
    if (peak.counts()) {
      // Next to 1, a mass is known by what lies beside it.
      m.log_q = -std::log1p(s.sum / m.peak_s) / kLn2;
      const double log_p = t.sum < m.peak_t ? -std::log1p(t.sum / m.peak_t) / kLn2
                                            : apart(peak.t, t.origin()) * scale - std::log2(m.all_t);
      m.log_ratio = apart(m.log_q, log_p);
    }
    return m;
  }
  bool empty() const { return (s.sum == 0.0 && !peak.exists()) || (t.sum == 0.0 && !peak.counts()); }

  // Whose sums include the peak, as they are kept.
  template <class S> void store(const Normalizers& out, int64_t n) const {
    Side all_s = s, all_t = t;
    all_s.sum = masses.all_s;
    all_t.sum = masses.all_t;
    store_normalizer<S>(all_s, scale, out.max_s, out.sum_s, n);
    store_normalizer<S>(all_t, scale, out.max_t, out.sum_t, n);
  }

  // D and what its gradient needs.
  RowResult finish() {
    const Masses& m = masses = measure();
    if (!kRatios || empty()) return {};
    const double q_lost = (s.sum - keep_s + (peak.counts() ? 0.0 : m.peak_s)) / m.all_s;
    RowResult r;
    if (!peak.counts()) {
      // Nothing to take the log-ratios from, and nothing cancels: the peak's gradient is 0.
      const double offset = std::log2(m.all_t) - std::log2(m.all_s);
      const double reverse = (scale * gap_s + keep_s * offset) / m.all_s * kLn2;
      const double forward = -(scale * gap_t + keep_t * offset) / m.all_t * kLn2;
      r.d = (kForward ? forward : 0.0) + (kReverse ? reverse : 0.0);
      r.sum_g = (kForward ? -keep_t / m.all_t : 0.0) + (kReverse ? reverse - q_lost : 0.0);
      return r;
    }
    // From log-ratios less the peak's: Σ q·ψ over the others, with ψ less its value at the peak, -c.
    const double own = gap(peak);
    const double reverse = scale * (gap_s - keep_s * own) / m.all_s * kLn2;
    // From those less the anchors', near which the teacher has its mass. Far from both, the peak's has too few digits.
    constexpr double kFar = 32.0;
    const double offset = std::fabs(own * scale) < kFar ? m.log_ratio - own * scale
                                                        : std::log2(m.all_t) - std::log2(m.all_s);
    const double forward = -(scale * gap_t + keep_t * offset) / m.all_t * kLn2;
    const double ratio = kForward ? std::exp2(-m.log_ratio) : 0.0, nats = m.log_ratio * kLn2;
    double c = 0.0, others = 0.0;
    if (kReverse) {
      r.d += reverse + nats * (keep_s + m.peak_s) / m.all_s;
      c -= nats;
      others += reverse - q_lost;
    }
    if (kForward) {
      r.d += forward - nats * m.peak_t / m.all_t;
      c += ratio;
      others += ratio * keep_s / m.all_s - keep_t / m.all_t;
    }
    others += c * q_lost;
    r.set_gradient(peak.index, m.peak_s / m.all_s, c, others);
    return r;
  }
};

// Normalisers alone: the first of two sweeps.
using NormalizerFold = KLFold<false, false>;

}  // namespace ADAKD_ISA
}  // namespace adakd
