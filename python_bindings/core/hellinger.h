// Squared Hellinger distance of two rows in one sweep, without cancellation, from two exponentials an entry: equation (2)
// and the difficulty of every token (docs/maths.md, section 5).
//
// With a = 2^((zs - anchor_s)·h), b likewise and h = log2(e)/(2τ), a² and b² are unnormalised masses. A block gives
// S = Σa², T = Σb², D = Σd², E = Σdb of d = a - κb with κ the ratio √(S/T) of what came before. Around the block's own
// ratio ρ that is Σ(a - ρb)² = D + 2oE + o²T with o = κ - ρ; where most of it cancels, the block is folded again around
// ρ. Blocks then merge by their shares of the masses, in double.
#pragma once

#include "kl.h"

namespace adakd {
namespace ADAKD_ISA {

// kGradient: as a divergence, with the peak apart and Σab for the gradient.
template <bool kGradient> struct HellingerFold {
  static constexpr bool kPeak = kGradient;

  double half;  // h, half of the scale of a logit
  Side s{}, t{};
  double distance = 0.0;
  double products = 0.0;  // Σab
  Peak peak{};
  double passing = -kInfinity;  // the logit of the new peak in a block that was not added

  explicit HellingerFold(double scale) : half(0.5 * scale) {}

  struct Sums {
    double s, t, d, e, products;
    Maxima max;
    bool finite() const { return std::isfinite(s + t + d + e); }
  };

  template <class V, class T> Sums sums(const Block<T>& block, Scalar<V> kappa) const {
    const V h = broadcast<V>(static_cast<Scalar<V>>(half));
    const V m_s = broadcast<V>(static_cast<Scalar<V>>(s.origin() * (kFused<V> ? half : 1.0)));
    const V m_t = broadcast<V>(static_cast<Scalar<V>>(t.origin() * (kFused<V> ? half : 1.0)));
    const V minus_kappa = broadcast<V>(-kappa);
    Total<V> total_s, total_t, total_d, total_e, total_p;
    Pair<V> sum_s{}, sum_t{}, sum_d{}, sum_e{}, sum_p{};
    V max_s = broadcast<V>(-kInfinity), max_t = max_s;
    const auto entry = [&](V zs, V zt, V& ss, V& tt, V& dd, V& ee, V& pp) ADAKD_INLINE_LAMBDA {
      max_s = max(max_s, zs);
      max_t = max(max_t, zt);
      const V a = exp2(kFused<V> ? fma(zs, h, -m_s) : (zs - m_s) * h);
      const V b = exp2(kFused<V> ? fma(zt, h, -m_t) : (zt - m_t) * h);
      const V d = fma(minus_kappa, b, a);
      ss = fma(a, a, ss);
      tt = fma(b, b, tt);
      dd = fma(d, d, dd);
      ee = fma(d, b, ee);
      if (kGradient) pp = fma(a, b, pp);
    };
    for_each_pair<V>(
        block,
        [&](const Pair<V>& zs, const Pair<V>& zt) ADAKD_INLINE_LAMBDA {
          entry(zs.first, zt.first, sum_s.first, sum_t.first, sum_d.first, sum_e.first, sum_p.first);
          entry(zs.second, zt.second, sum_s.second, sum_t.second, sum_d.second, sum_e.second, sum_p.second);
        },
        [&]() ADAKD_INLINE_LAMBDA {
          total_s.take(sum_s);
          total_t.take(sum_t);
          total_d.take(sum_d);
          total_e.take(sum_e);
          if (kGradient) total_p.take(sum_p);
        });
    return {total_s.value(), total_t.value(), total_d.value(), total_e.value(), kGradient ? total_p.value() : 0.0,
            {max_lanes(max_s), max_lanes(max_t)}};
  }

  // An entry at -inf has a = 0 or b = 0 and needs no guard.
  template <bool kGuarded, class V, class T> Added add(const Block<T>& block) {
    if (s.anchor == -kInfinity || t.anchor == -kInfinity) {
      const Maxima first = block_maxima<V>(block);
      raise<V>(first);
      if (passes(first.s)) return Added::kNewPeak;
    }
    if (!holds<V>()) return Added::kNotInThisType;
    Scalar<V> kappa = ratio<V>(s.sum, t.sum);
    Sums x = sums<V>(block, kappa);
    const bool raised = raise<V>(x.max);
    if (passes(x.max.s)) return Added::kNewPeak;
    if (raised) {
      if (!holds<V>()) return Added::kNotInThisType;
      kappa = ratio<V>(s.sum, t.sum);
      x = sums<V>(block, kappa);
    }
    double difference = around_own_ratio(x, kappa);
    if (difference < 0.5 * x.d) {
      kappa = ratio<V>(x.s, x.t);
      x = sums<V>(block, kappa);
      difference = around_own_ratio(x, kappa);
    }
    if (sizeof(Scalar<V>) == 4 && !x.finite()) return Added::kNotInThisType;
    merge(x.s, x.t, x.s > 0.0 && x.t > 0.0 ? 0.5 * difference / x.s : 0.0);
    products += x.products;
    s.include(x.max.s);
    t.include(x.max.t);
    return Added::kYes;
  }

  // √(S/T), or 1 where one is 0. Bounded, for far from the block's own ratio it serves only to find that out, and its
  // square has to stay in the type.
  template <class V> static Scalar<V> ratio(double mass_s, double mass_t) {
    if (!(mass_s > 0.0 && mass_t > 0.0)) return 1;
    return static_cast<Scalar<V>>(min(std::sqrt(mass_s / mass_t), kLargestRatio));
  }
  static constexpr double kLargestRatio = 1.0e9;

  // Moves anchors that are too low for a block with these maxima; whether one moved.
  template <class V> bool raise(Maxima max) {
    const bool low_s = !kGradient && s.too_low(max.s, half), low_t = t.too_low(max.t, half);
    if (low_s) s.move(anchor_at<V>(max.s), 2.0 * half);
    if (low_t) products *= std::sqrt(t.move(anchor_at<V>(max.t), 2.0 * half));
    return low_s || low_t;
  }

  // A logit; or next to one such that anchor·h is a float, and one fused multiply-add subtracts it exactly.
  template <class V> double anchor_at(double logit) const {
    return kFused<V> && !far(logit) ? static_cast<float>(logit * half) / half : logit;
  }

  // Far from 0 such an anchor is not next to its logit.
  bool far(double logit) const { return !(std::fabs(logit * half) < 0x1p16); }
  template <class V> bool holds() const { return !kFused<V> || !(far(s.origin()) || far(t.origin())); }

  bool has_no_mass(double logit) const { return s.has_no_mass(logit, half) && t.has_no_mass(logit, half); }

  bool passes(double logit) {
    if (!kGradient || !peak.passed_by(logit, 2.0 * half)) return false;
    passing = logit;
    return true;
  }

  // The former peak joins the other entries.
  void take_peak(const Peak& next) {
    products *= std::sqrt(s.move(anchor_at<Floats>(next.s), 2.0 * half));
    if (peak.exists()) join(peak);
    peak = next;
    s.include(next.s);
    t.include(next.t);
  }

  void join(const Peak& one) {
    const double mass_s = s.mass(one.s, 2.0 * half), mass_t = t.mass(one.t, 2.0 * half);
    products += std::sqrt(mass_s * mass_t);
    merge(mass_s, mass_t, 0.0);
  }

  template <class S> void store(const Normalizers& out, int64_t n) const {
    store_normalizer<S>(s, 2.0 * half, out.max_s, out.sum_s, n);
    store_normalizer<S>(t, 2.0 * half, out.max_t, out.sum_t, n);
  }

  // Σ(a - ρb)² with ρ² = S/T.
  static double around_own_ratio(const Sums& x, double kappa) {
    if (!(x.s > 0.0 && x.t > 0.0)) return x.d;
    const double o = -(x.d + 2.0 * kappa * x.e) / (x.t * (kappa + std::sqrt(x.s / x.t)));
    return x.d + 2.0 * o * x.e + o * o * x.t;
  }

  // Joins a block of masses (S, T) and own distance to what came before: with u², w² the shares of a part in the two
  // rows, s² = Σ u·w·(its s²) + ½ Σ (u - w)² over both parts.
  void merge(double mass_s, double mass_t, double own) {
    const double all_s = s.sum + mass_s, all_t = t.sum + mass_t;
    const double rcp_s = all_s == 0.0 ? 0.0 : 1.0 / all_s, rcp_t = all_t == 0.0 ? 0.0 : 1.0 / all_t;
    const double u0 = std::sqrt(s.sum * rcp_s), w0 = std::sqrt(t.sum * rcp_t);
    const double u1 = std::sqrt(mass_s * rcp_s), w1 = std::sqrt(mass_t * rcp_t);
    distance = u0 * w0 * distance + u1 * w1 * own + 0.5 * ((u0 - w0) * (u0 - w0) + (u1 - w1) * (u1 - w1));
    s.sum = all_s;
    t.sum = all_t;
  }

  // s² of the row; 0 where one side is empty, NaN where one holds NaN.
  double result() const {
    if (s.sum == 0.0 || t.sum == 0.0) return 0.0;
    return distance > 1.0 ? 1.0 : distance < 0.0 ? 0.0 : distance;
  }

  // As a divergence: the peak joins the sums, which no block follows.
  RowResult finish() {
    const double beside_s = s.sum, beside = products;
    if (peak.exists()) join(peak);
    RowResult r;
    r.d = result();
    if (s.sum == 0.0 || t.sum == 0.0) return r;
    const double others = -0.5 * beside / std::sqrt(s.sum * t.sum);
    r.sum_g = others;
    if (peak.counts()) {
      const double q = s.mass(peak.s, 2.0 * half) / s.sum, p = t.mass(peak.t, 2.0 * half) / t.sum;
      const double c = 0.5 * std::sqrt(p / q);
      r.set_gradient(peak.index, q, c, others + c * beside_s / s.sum);
    }
    return r;
  }
};

}  // namespace ADAKD_ISA
}  // namespace adakd
