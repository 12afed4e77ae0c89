// `token_divergence`: D(p^τ, q^τ) of a token, Σg of equation (10) and the normalisers at temperature τ.
//
// The KL family and the Hellinger distance read the row once, the others twice; the second time the row comes from the
// cache. Logarithms are to base 2 until a result is stored (docs/maths.md, section 5).
//
// Most rows have no entry at -inf, so a block is first folded without regard to such entries. Each makes the block's sum
// of log-ratios infinite or NaN, and then the block is folded again with guards.
#pragma once

#include "divergence_terms.h"
#include "hellinger.h"

namespace adakd {
namespace ADAKD_ISA {

// z - m, with guards bounded below; the same number for every logit that is not at the end of the type's range.
template <bool kGuarded, class V> ADAKD_INLINE V difference(V z, V m) {
  return kGuarded ? max(broadcast<V>(kLowest), z - m) : z - m;
}

// Normalisers, and for both KL divergences the mass and the summed log-ratio over entries that are -inf on no side.
template <bool kForward, bool kReverse> struct KLFold {
  double scale;
  Side s{}, t{};
  double keep_s = 0.0, keep_t = 0.0;  // Σq, Σp over those entries
  double gap_s = 0.0, gap_t = 0.0;    // Σ q·log2(q/p) and Σ p·log2(q/p) over them, from differences to the anchors

  explicit KLFold(double scale) : scale(scale) {}

  struct Sums {
    double s, t, keep_s, keep_t, gap_s, gap_t;
    Maxima max;
  };

  template <bool kGuarded, class V, class T> Sums sums(const T* ps, const T* pt, int n) const {
    const V k = constant<V>(scale), m_s = constant<V>(s.origin()), m_t = constant<V>(t.origin()), zero = V{};
    const V minus_infinity = broadcast<V>(-kInfinity), one = constant<V>(1.0);
    Total<V> total_s, total_t, total_rs, total_rt, total_ks, total_kt;
    Pair<V> sum_s{}, sum_t{}, ratio_s{}, ratio_t{}, kept_s{}, kept_t{};
    V max_s = minus_infinity, max_t = minus_infinity;
    const auto entry = [&](V zs, V zt, V& ss, V& tt, V& rs, V& rt, V& ks, V& kt) ADAKD_INLINE_LAMBDA {
      max_s = max(max_s, zs);
      max_t = max(max_t, zt);
      const V from_s = difference<kGuarded>(zs, m_s), from_t = difference<kGuarded>(zt, m_t);
      const V a = exp2(from_s * k), b = exp2(from_t * k), gap = from_s - from_t;
      // Sums by multiply-adds: AMD's units for additions are the busier ones here, with exp2's rounding and scaling.
      ss = fma(a, one, ss);
      tt = fma(b, one, tt);
      if (kGuarded) {
        const V a_kept = zt != minus_infinity ? a : zero, b_kept = zs != minus_infinity ? b : zero;
        ks += a_kept;
        kt += b_kept;
        rs = fma(a_kept, gap, rs);
        rt = fma(b_kept, gap, rt);
      } else {
        if (kReverse) rs = fma(a, gap, rs);
        if (kForward) rt = fma(b, gap, rt);
      }
    };
    for_each_pair<V>(
        n,
        [&](int i) ADAKD_INLINE_LAMBDA {
          const Pair<V> zs = load_pair(ps + i), zt = load_pair(pt + i);
          entry(zs.first, zt.first, sum_s.first, sum_t.first, ratio_s.first, ratio_t.first, kept_s.first, kept_t.first);
          entry(zs.second, zt.second, sum_s.second, sum_t.second, ratio_s.second, ratio_t.second, kept_s.second,
                kept_t.second);
        },
        [&]() ADAKD_INLINE_LAMBDA {
          total_s.take(sum_s);
          total_t.take(sum_t);
          if (kReverse || kGuarded) total_rs.take(ratio_s);
          if (kForward || kGuarded) total_rt.take(ratio_t);
          if (kGuarded) total_ks.take(kept_s);
          if (kGuarded) total_kt.take(kept_t);
        });
    Sums x{total_s.value(), total_t.value(), 0.0, 0.0, scale * total_rs.value(), scale * total_rt.value(),
           {max_lanes(max_s), max_lanes(max_t)}};
    x.keep_s = kGuarded ? total_ks.value() : x.s;
    x.keep_t = kGuarded ? total_kt.value() : x.t;
    return x;
  }

  template <bool kGuarded, class V, class T> bool add(const T* ps, const T* pt, int n) {
    if (s.anchor == -kInfinity || t.anchor == -kInfinity) raise(block_maxima<V>(ps, pt, n));
    Sums x = sums<kGuarded, V>(ps, pt, n);
    if (raise(x.max)) x = sums<kGuarded, V>(ps, pt, n);
    if (!kGuarded && !std::isfinite(x.gap_s + x.gap_t)) return false;
    s.sum += x.s;
    t.sum += x.t;
    keep_s += x.keep_s;
    keep_t += x.keep_t;
    gap_s += x.gap_s;
    gap_t += x.gap_t;
    s.max = x.max.s > s.max ? x.max.s : s.max;
    t.max = x.max.t > t.max ? x.max.t : t.max;
    return true;
  }

  // Moves anchors that are too low for a block with these maxima; whether one moved. The log-ratios of all entries so
  // far move by the same number.
  bool raise(Maxima max) {
    const bool low_s = s.too_low(max.s, scale), low_t = t.too_low(max.t, scale);
    if (!low_s && !low_t) return false;
    const double to_s = low_s ? max.s : s.anchor, to_t = low_t ? max.t : t.anchor;
    if (s.sum != 0.0 && t.sum != 0.0) {
      const double shift = ((s.anchor - to_s) - (t.anchor - to_t)) * scale;
      gap_s += keep_s * shift;
      gap_t += keep_t * shift;
    }
    const double f_s = s.move(to_s, scale), f_t = t.move(to_t, scale);
    gap_s *= f_s;
    keep_s *= f_s;
    gap_t *= f_t;
    keep_t *= f_t;
    return true;
  }

  // D and Σg, the latter without the mass of q on entries left out (docs/maths.md, section 4).
  void result(double& d, double& sum_g) const {
    const double some_s = s.sum == 0.0 ? 1.0 : s.sum, some_t = t.sum == 0.0 ? 1.0 : t.sum;
    const double log_ratio = std::log2(some_t) - std::log2(some_s);
    const double reverse = (gap_s + keep_s * log_ratio) / some_s * kLn2;
    const double forward = -(gap_t + keep_t * log_ratio) / some_t * kLn2;
    d = (kForward ? forward : 0.0) + (kReverse ? reverse : 0.0);
    sum_g = (kForward ? -keep_t / some_t : 0.0) + (kReverse ? reverse - (s.sum - keep_s) / some_s : 0.0);
  }
};

// Normalisers alone: the first of two sweeps.
struct NormalizerFold {
  double scale;
  Side s{}, t{};

  explicit NormalizerFold(double scale) : scale(scale) {}

  struct Sums {
    double s, t;
    Maxima max;
  };

  template <class V, class T> Sums sums(const T* ps, const T* pt, int n) const {
    const V k = constant<V>(scale), m_s = constant<V>(s.origin()), m_t = constant<V>(t.origin());
    Total<V> total_s, total_t;
    Pair<V> sum_s{}, sum_t{};
    V max_s = broadcast<V>(-kInfinity), max_t = max_s;
    for_each_pair<V>(
        n,
        [&](int i) ADAKD_INLINE_LAMBDA {
          const Pair<V> zs = load_pair(ps + i), zt = load_pair(pt + i);
          max_s = max(max(max_s, zs.first), zs.second);
          max_t = max(max(max_t, zt.first), zt.second);
          sum_s.first += exp2((zs.first - m_s) * k);
          sum_t.first += exp2((zt.first - m_t) * k);
          sum_s.second += exp2((zs.second - m_s) * k);
          sum_t.second += exp2((zt.second - m_t) * k);
        },
        [&]() ADAKD_INLINE_LAMBDA {
          total_s.take(sum_s);
          total_t.take(sum_t);
        });
    return {total_s.value(), total_t.value(), {max_lanes(max_s), max_lanes(max_t)}};
  }

  template <bool kGuarded, class V, class T> bool add(const T* ps, const T* pt, int n) {
    if (s.anchor == -kInfinity || t.anchor == -kInfinity) raise(block_maxima<V>(ps, pt, n));
    Sums x = sums<V>(ps, pt, n);
    if (raise(x.max)) x = sums<V>(ps, pt, n);
    s.sum += x.s;
    t.sum += x.t;
    s.max = x.max.s > s.max ? x.max.s : s.max;
    t.max = x.max.t > t.max ? x.max.t : t.max;
    return true;
  }

  bool raise(Maxima max) {
    const bool low_s = s.too_low(max.s, scale), low_t = t.too_low(max.t, scale);
    if (low_s) s.move(max.s, scale);
    if (low_t) t.move(max.t, scale);
    return low_s || low_t;
  }
};

// Where a row's entries lie against its normalisers: log2 q = (z - m)·scale - c.
template <class V> struct Frame {
  V scale, m_s, m_t, c_s, c_t, c_gap;

  Frame(double scale, double m_s, double sum_s, double m_t, double sum_t)
      : Frame(scale, m_s, m_t, static_cast<Scalar<V>>(std::log2(sum_s)), static_cast<Scalar<V>>(std::log2(sum_t)), 0) {}

  template <bool kGuarded> ADAKD_INLINE Entry<V> entry(V zs, V zt) const {
    const V from_s = difference<kGuarded>(zs, m_s), from_t = difference<kGuarded>(zt, m_t);
    return {fma(from_s, scale, -c_s), fma(from_t, scale, -c_t), fma(from_s - from_t, scale, -c_gap)};
  }

  bool finite() const { return std::isfinite(m_s[0] + m_t[0] + c_s[0] + c_t[0]); }

 private:
  Frame(double scale, double m_s, double m_t, Scalar<V> c_s, Scalar<V> c_t, int)
      : scale(constant<V>(scale)), m_s(constant<V>(m_s)), m_t(constant<V>(m_t)), c_s(broadcast<V>(c_s)),
        c_t(broadcast<V>(c_t)), c_gap(broadcast<V>(c_s - c_t)) {}
};

// Σf and Σg from the normalisers: the second sweep.
template <class D> struct TermsFold {
  double scale, m_s, sum_s, m_t, sum_t, alpha, beta;
  double f = 0.0, g = 0.0;

  template <bool kGuarded, class V, class T> bool add(const T* ps, const T* pt, int n) {
    const Parameters<V> parameters{constant<V>(alpha), constant<V>(beta)};
    using Divergence = typename D::template Of<V>;
    const Divergence divergence(parameters);
    const Frame<V> frame(scale, m_s, sum_s, m_t, sum_t);
    const V minus_infinity = broadcast<V>(-kInfinity), zero = V{};
    Total<V> total_f, total_g;
    Pair<V> sum_f{}, sum_g{};
    bool finite = true;
    const auto entry = [&](V zs, V zt, V& ff, V& gg) ADAKD_INLINE_LAMBDA {
      const Entry<V> at = frame.template entry<kGuarded>(zs, zt);
      V f_here, g_here;
      divergence.terms(at, f_here, g_here);
      if (kGuarded) {
        const Mask<V> kept = (zs != minus_infinity) & (zt != minus_infinity);
        const V lost = Divergence::kWithoutQ ? -exp2(at.log_q) : zero;
        f_here = kept ? f_here : zero;
        g_here = kept ? g_here : lost;
      }
      ff += f_here;
      gg += g_here;
      return at.gap;
    };
    for_each_pair<V>(
        n,
        [&](int i) ADAKD_INLINE_LAMBDA {
          const Pair<V> zs = load_pair(ps + i), zt = load_pair(pt + i);
          const V gap_1 = entry(zs.first, zt.first, sum_f.first, sum_g.first);
          const V gap_2 = entry(zs.second, zt.second, sum_f.second, sum_g.second);
          if constexpr (!kGuarded) finite &= all_finite(gap_1, gap_2);
        },
        [&]() ADAKD_INLINE_LAMBDA {
          total_f.take(sum_f);
          total_g.take(sum_g);
        });
    if (!finite) return false;
    f += total_f.value();
    g += total_g.value();
    return true;
  }
};

// The fold that a divergence of one sweep takes; HellingerFold has results of its own.
template <class D> struct OneSweep { using Fold = void; };
template <> struct OneSweep<Tag<ForwardKL>> { using Fold = KLFold<true, false>; };
template <> struct OneSweep<Tag<ReverseKL>> { using Fold = KLFold<false, true>; };
template <> struct OneSweep<Tag<Jeffreys>> { using Fold = KLFold<true, true>; };

template <class V> void token_divergence_row(const DivergenceCall& call, int64_t n) {
  using S = Scalar<V>;
  S* const d = static_cast<S*>(call.d) + n;
  S* const sum_g = static_cast<S*>(call.sum_g) + n;
  if (!call.mask[n]) {
    *d = *sum_g = 0;
    store_ignored<S>(call.out, n);
    return;
  }
  const Rows& rows = call.rows;
  const Row s = row_of(rows.student, n, rows.tokens), t = row_of(rows.teacher, n, rows.tokens);
  const double scale = scale_of<V>(static_cast<const S*>(call.temperature)[n]);
  double d_row = 0.0, sum_g_row = 0.0;
  const auto one_sweep = [&](auto fold) {
    sweep<V>(s, t, rows.vocab, fold);
    fold.result(d_row, sum_g_row);
    store_normalizer<S>(fold.s, fold.scale, call.out.max_s, call.out.sum_s, n);
    store_normalizer<S>(fold.t, fold.scale, call.out.max_t, call.out.sum_t, n);
  };
  with_divergence(call.divergence, [&](auto tag) {
    using D = decltype(tag);
    if constexpr (D::template Of<V>::kTwoSweeps) {
      NormalizerFold fold(scale);
      sweep<V>(s, t, rows.vocab, fold);
      store_normalizer<S>(fold.s, fold.scale, call.out.max_s, call.out.sum_s, n);
      store_normalizer<S>(fold.t, fold.scale, call.out.max_t, call.out.sum_t, n);
      if (fold.s.sum == 0.0 || fold.t.sum == 0.0) return;
      // From the normalisers as they are kept: so the backward finds the same sign of a log-ratio next to 0.
      const auto kept = [n](const void* array) -> double { return static_cast<const S*>(array)[n]; };
      TermsFold<D> terms{fold.scale,           kept(call.out.max_s), kept(call.out.sum_s), kept(call.out.max_t),
                         kept(call.out.sum_t), call.alpha,           call.beta};
      sweep<V>(s, t, rows.vocab, terms);
      d_row = terms.f;
      sum_g_row = terms.g;
    } else if constexpr (std::is_same_v<D, Tag<Hellinger>>) {
      HellingerFold fold(scale);
      sweep<V>(s, t, rows.vocab, fold);
      d_row = fold.result();
      sum_g_row = 0.5 * d_row - 0.5;
      fold.template store<S>(call.out, n);
    } else {
      using Fold = typename OneSweep<D>::Fold;
      static_assert(!std::is_void_v<Fold>, "a divergence of one sweep needs a fold in OneSweep, others say kTwoSweeps");
      if constexpr (!std::is_void_v<Fold>) one_sweep(Fold(scale));
    }
  });
  *d = static_cast<S>(d_row);
  *sum_g = static_cast<S>(sum_g_row);
}

}  // namespace ADAKD_ISA
}  // namespace adakd
