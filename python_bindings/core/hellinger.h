// Squared Hellinger distance of two rows in one sweep, without cancellation, from two exponentials an entry: equation (2)
// and the difficulty of every token (docs/maths.md, section 5).
//
// With a = 2^((zs - anchor_s)·h), b likewise and h = log2(e)/(2τ), a² and b² are unnormalised masses. A block gives
// S = Σa², T = Σb², D = Σd², E = Σdb of d = a - κb with κ the ratio √(S/T) of what came before. Around the block's own
// ratio ρ that is Σ(a - ρb)² = D + 2oE + o²T with o = κ - ρ; where most of it cancels, the block is folded again around
// ρ. Blocks then merge by their shares of the masses, in double.
#pragma once

#include "rows.h"

namespace adakd {
namespace ADAKD_ISA {

struct HellingerFold {
  double half;  // h, half of the scale of a logit
  Side s{}, t{};
  double distance = 0.0;

  explicit HellingerFold(double scale) : half(0.5 * scale) {}

  struct Sums {
    double s, t, d, e;
    Maxima max;
  };

  template <class V, class T> Sums sums(const T* ps, const T* pt, int n, Scalar<V> kappa) const {
    const V h = broadcast<V>(static_cast<Scalar<V>>(half));
    const V m_s = broadcast<V>(static_cast<Scalar<V>>(s.origin() * (kFused<V> ? half : 1.0)));
    const V m_t = broadcast<V>(static_cast<Scalar<V>>(t.origin() * (kFused<V> ? half : 1.0)));
    const V minus_kappa = broadcast<V>(-kappa);
    Total<V> total_s, total_t, total_d, total_e;
    Pair<V> sum_s{}, sum_t{}, sum_d{}, sum_e{};
    V max_s = broadcast<V>(-kInfinity), max_t = max_s;
    const auto entry = [&](V zs, V zt, V& ss, V& tt, V& dd, V& ee) ADAKD_INLINE_LAMBDA {
      max_s = max(max_s, zs);
      max_t = max(max_t, zt);
      const V a = exp2(kFused<V> ? fma(zs, h, -m_s) : (zs - m_s) * h);
      const V b = exp2(kFused<V> ? fma(zt, h, -m_t) : (zt - m_t) * h);
      const V d = fma(minus_kappa, b, a);
      ss = fma(a, a, ss);
      tt = fma(b, b, tt);
      dd = fma(d, d, dd);
      ee = fma(d, b, ee);
    };
    for_each_pair<V>(
        n,
        [&](int i) ADAKD_INLINE_LAMBDA {
          const Pair<V> zs = load_pair(ps + i), zt = load_pair(pt + i);
          entry(zs.first, zt.first, sum_s.first, sum_t.first, sum_d.first, sum_e.first);
          entry(zs.second, zt.second, sum_s.second, sum_t.second, sum_d.second, sum_e.second);
        },
        [&]() ADAKD_INLINE_LAMBDA {
          total_s.take(sum_s);
          total_t.take(sum_t);
          total_d.take(sum_d);
          total_e.take(sum_e);
        });
    return {total_s.value(), total_t.value(), total_d.value(), total_e.value(), {max_lanes(max_s), max_lanes(max_t)}};
  }

  // An entry at -inf has a = 0 or b = 0 and needs no guard, so this never asks for one.
  template <bool kGuarded, class V, class T> bool add(const T* ps, const T* pt, int n) {
    if (s.anchor == -kInfinity || t.anchor == -kInfinity) raise<V>(block_maxima<V>(ps, pt, n));
    Scalar<V> kappa = s.sum > 0.0 && t.sum > 0.0 ? static_cast<Scalar<V>>(std::sqrt(s.sum / t.sum)) : 1;
    Sums x = sums<V>(ps, pt, n, kappa);
    if (raise<V>(x.max)) {
      kappa = s.sum > 0.0 && t.sum > 0.0 ? static_cast<Scalar<V>>(std::sqrt(s.sum / t.sum)) : 1;
      x = sums<V>(ps, pt, n, kappa);
    }
    double difference = around_own_ratio(x, kappa);
    if (difference < 0.5 * x.d) {
      kappa = static_cast<Scalar<V>>(std::sqrt(x.s / x.t));
      x = sums<V>(ps, pt, n, kappa);
      difference = around_own_ratio(x, kappa);
    }
    merge(x.s, x.t, x.s > 0.0 && x.t > 0.0 ? 0.5 * difference / x.s : 0.0);
    s.max = x.max.s > s.max ? x.max.s : s.max;
    t.max = x.max.t > t.max ? x.max.t : t.max;
    return true;
  }

  // Moves anchors that are too low for a block with these maxima; whether one moved.
  template <class V> bool raise(Maxima max) {
    const bool low_s = s.too_low(max.s, half), low_t = t.too_low(max.t, half);
    if (low_s) s.move(anchor_at<V>(max.s), 2.0 * half);
    if (low_t) t.move(anchor_at<V>(max.t), 2.0 * half);
    return low_s || low_t;
  }

  // A logit; or next to one such that anchor·h is a float, and one fused multiply-add subtracts it exactly.
  template <class V> double anchor_at(double logit) const {
    return kFused<V> ? static_cast<float>(logit * half) / half : logit;
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
    return distance > 1.0 ? 1.0 : distance;
  }
};

}  // namespace ADAKD_ISA
}  // namespace adakd
