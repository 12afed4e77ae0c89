// Squared Hellinger distance of two rows in one sweep, without cancellation, from two exponentials an entry: equation
// (2) and the difficulty of every token (docs/maths.md, section 5.3).
//
// Let a = 2^((s - anchor_s)·half) and b likewise of the teacher, half = log2(e)/(2τ): the roots of unnormalised masses.
// A block gives Σa², Σb², Σd² and Σdb of d = a - κ·b, where κ is √(Σa²/Σb²) of the entries before it. The distance
// within the block needs Σ(a - ρ·b)² with the block's own ratio ρ, which is Σd² + 2·o·Σdb + o²·Σb² with o = κ - ρ. If
// most of that cancels, because ρ is far from κ, the block is folded again with κ = ρ. Blocks are merged in double.
#pragma once

#include "sweep.h"

namespace adakd {
namespace ADAKD_ISA {

// kGradient: as a divergence, with the peak kept out of the sums and Σab for the gradient. Without it: the distance and
// the normalisers, for the difficulty.
template <bool kGradient> struct HellingerFold {
  static constexpr bool kPeak = kGradient;

  double half;  // half of the scale of a logit
  RunningNormalizer student{}, teacher{};
  double distance = 0.0;  // s² of the entries so far, as if they were the row
  double both = 0.0;      // Σab
  Peak peak{};
  NewPeak new_peak{};

  explicit HellingerFold(double scale) : half(0.5 * scale) {}

  // The sums of a block's first `added` entries: Σa², Σb², Σd², Σdb and Σab. The maxima are those of one chain more,
  // where that one has a logit beyond the peak's limit.
  struct Sums {
    double l_s, l_t, dd, db, both;
    Maxima max;
    int added;
    bool all_finite() const { return std::isfinite(l_s + l_t + dd + db); }
  };

  // The same sums in the loop.
  template <class V> struct ChainSums {
    ChainSum<V> l_s, l_t, dd, db, both;
  };

  template <class V, class T> Sums sums(const Block<T>& block, Scalar<V> kappa) const {
    // With fused multiply-adds s·half - m·half is rounded once, because m·half is a float (see anchor_at). Without them
    // (s - m)·half is the more accurate.
    const V h = broadcast<V>(static_cast<Scalar<V>>(half));
    const V m_s = broadcast<V>(static_cast<Scalar<V>>(student.origin() * (kFused<V> ? half : 1.0)));
    const V m_t = broadcast<V>(static_cast<Scalar<V>>(teacher.origin() * (kFused<V> ? half : 1.0)));
    const V minus_kappa = broadcast<V>(-kappa), limit = broadcast<V>(peak.template limit<Scalar<V>>(2.0 * half));
    Total<V> l_s, l_t, dd, db, both;
    ChainSums<V> sum;
    V max_s = broadcast<V>(-kInfinity), max_t = max_s;
    const auto add = [&](const auto& s, const auto& t, int i) ADAKD_INLINE_LAMBDA {
      using X = std::decay_t<decltype(s)>;
      max_s = max(s, max_s);
      max_t = max(t, max_t);
      const X a = mass_of(X(kFused<V> ? fma(s, h, -m_s) : (s - m_s) * h));
      const X b = mass_of(X(kFused<V> ? fma(t, h, -m_t) : (t - m_t) * h));
      const X d = fma(minus_kappa, b, a);
      sum.l_s.add_product(a, a, i);
      sum.l_t.add_product(b, b, i);
      sum.dd.add_product(d, d, i);
      sum.db.add_product(d, b, i);
      if (kGradient) sum.both.add_product(a, b, i);
    };
    const int added = for_each_step<V>(block, add, [&]() ADAKD_INLINE_LAMBDA {
      if (kGradient && any(max_s > limit)) return false;
      l_s.take(sum.l_s);
      l_t.take(sum.l_t);
      dd.take(sum.dd);
      db.take(sum.db);
      if (kGradient) both.take(sum.both);
      return true;
    });
    return {l_s.value(), l_t.value(), dd.value(), db.value(), kGradient ? both.value() : 0.0,
            {max_lanes(max_s), max_lanes(max_t)}, added};
  }

  // The distance within a block, as if it were the row, from its sums around κ. Where most of Σd² cancels, it takes the
  // sums again around the block's own ratio, and leaves those in x.
  template <class V, class T> double block_distance(const Block<T>& block, Scalar<V> kappa, Sums& x) const {
    double squares = around_own_ratio(x, kappa);
    if (squares < 0.5 * x.dd) {
      kappa = ratio<V>(x.l_s, x.l_t);
      x = sums<V>(block, kappa);
      squares = around_own_ratio(x, kappa);
    }
    return x.l_s > 0.0 && x.l_t > 0.0 ? 0.5 * squares / x.l_s : 0.0;
  }

  // Adds a block, up to a new peak, unless it does not suit this type. An entry at -inf has a = 0 or b = 0 and needs no
  // guard. Anchors and κ are guessed from what came before, so most blocks are read once.
  template <bool kGuarded, class V, class T> Added add(const Block<T>& block) {
    if (student.anchor == -kInfinity || teacher.anchor == -kInfinity) {
      const Maxima first = block_maxima<V>(block.template head<V>());
      raise<V>(first);
      if (kGradient && first.s > peak.template limit<Scalar<V>>(2.0 * half)) {
        new_peak = {0, first.s};
        return Added::kNewPeak;
      }
    }
    if (!holds_anchors<V>()) return Added::kRetry;
    Scalar<V> kappa = ratio<V>(student.l, teacher.l);
    Sums x = sums<V>(block, kappa);
    if (raise<V>(x.max)) {
      if (!holds_anchors<V>()) return Added::kRetry;
      kappa = ratio<V>(student.l, teacher.l);
      x = sums<V>(block, kappa);
    }
    const double part_distance = block_distance<V>(block, kappa, x);
    // There is no way after the one in double: NaN then comes from the logits and is added.
    if (!kIsDouble<V> && !x.all_finite()) return Added::kRetry;
    merge(x.l_s, x.l_t, part_distance);
    both += x.both;
    student.include(x.max.s);
    teacher.include(x.max.t);
    new_peak = {x.added, x.max.s};
    return x.added < block.n ? Added::kNewPeak : Added::kYes;
  }

  // √(l_s/l_t), or 1 where one of them is 0. It is bounded, because its square has to stay in the type's range; a κ so
  // far from the block's own ratio only has to show that the block must be folded again.
  template <class V> static Scalar<V> ratio(double l_s, double l_t) {
    if (!(l_s > 0.0 && l_t > 0.0)) return 1;
    return static_cast<Scalar<V>>(min(std::sqrt(l_s / l_t), kLargestRatio));
  }
  static constexpr double kLargestRatio = 1.0e9;

  // Moves the anchors that are too low for a block with these maxima; the student's only where no peak holds it.
  // Returns whether one moved.
  template <class V> bool raise(Maxima max) {
    const bool low_s = !kGradient && student.too_low(max.s, half), low_t = teacher.too_low(max.t, half);
    if (low_s) student.move(anchor_at<V>(max.s), 2.0 * half);
    if (low_t) both *= std::sqrt(teacher.move(anchor_at<V>(max.t), 2.0 * half));
    return low_s || low_t;
  }

  // The anchor for a logit: with fused multiply-adds the nearest number whose product with half is a float, so that the
  // loop subtracts it exactly; else the logit.
  template <class V> double anchor_at(double logit) const {
    return kFused<V> && !far(logit) ? static_cast<float>(logit * half) / half : logit;
  }

  // Far from 0 neighbouring floats lie so far apart that such an anchor would not be near its logit.
  bool far(double logit) const { return !(std::fabs(logit * half) < 0x1p16); }

  // Whether vectors of V can be folded with these anchors.
  template <class V> bool holds_anchors() const {
    return !kFused<V> || !(far(student.origin()) || far(teacher.origin()));
  }

  bool has_no_mass(double logit) const { return student.has_no_mass(logit, half) && teacher.has_no_mass(logit, half); }

  // Makes `next` the peak and the student's anchor. The former peak joins the other entries.
  void take_peak(const Peak& next) {
    both *= std::sqrt(student.move(anchor_at<Floats>(next.s), 2.0 * half));
    if (peak.exists()) join(peak);
    peak = next;
    student.include(next.s);
    teacher.include(next.t);
  }

  // Adds one entry: a block of distance 0.
  void join(const Peak& entry) {
    const double mass_s = student.mass(entry.s, 2.0 * half), mass_t = teacher.mass(entry.t, 2.0 * half);
    both += std::sqrt(mass_s * mass_t);
    merge(mass_s, mass_t, 0.0);
  }

  // Stores the normalisers of token n. As a divergence, finish() comes first and adds the peak.
  template <class S> void store(const Normalizers& out, int64_t n) const {
    store_normalizer<S>(student, 2.0 * half, out.max_s, out.sum_s, n);
    store_normalizer<S>(teacher, 2.0 * half, out.max_t, out.sum_t, n);
  }

  // Σ(a - ρ·b)² with the block's own ratio ρ. o = κ - ρ comes from κ² - ρ² = -(Σd² + 2κ·Σdb)/Σb², which keeps its
  // digits where κ is next to ρ.
  static double around_own_ratio(const Sums& x, double kappa) {
    if (!(x.l_s > 0.0 && x.l_t > 0.0)) return x.dd;
    const double o = -(x.dd + 2.0 * kappa * x.db) / (x.l_t * (kappa + std::sqrt(x.l_s / x.l_t)));
    return x.dd + 2.0 * o * x.db + o * o * x.l_t;
  }

  // Joins a part with these masses and this distance to what came before. With u², w² the parts' fractions of the two
  // rows' masses, s² = Σ u·w·(s² of the part) + ½ Σ (u - w)², over both parts.
  void merge(double mass_s, double mass_t, double part_distance) {
    const double l_s = student.l + mass_s, l_t = teacher.l + mass_t;
    const double rcp_s = l_s == 0.0 ? 0.0 : 1.0 / l_s, rcp_t = l_t == 0.0 ? 0.0 : 1.0 / l_t;
    const double u0 = std::sqrt(student.l * rcp_s), w0 = std::sqrt(teacher.l * rcp_t);
    const double u1 = std::sqrt(mass_s * rcp_s), w1 = std::sqrt(mass_t * rcp_t);
    distance = u0 * w0 * distance + u1 * w1 * part_distance + 0.5 * ((u0 - w0) * (u0 - w0) + (u1 - w1) * (u1 - w1));
    student.l = l_s;
    teacher.l = l_t;
  }

  // s² of the row: 0 where one side is empty, NaN where one holds NaN.
  double result() const {
    if (student.l == 0.0 || teacher.l == 0.0) return 0.0;
    return distance > 1.0 ? 1.0 : distance < 0.0 ? 0.0 : distance;
  }

  // D, Σg and the peak's gradient, of g = -½√(pq) and c = -g/q = ½√(p/q) of the peak. No block may follow, because the
  // peak joins the sums.
  RowResult finish() {
    const double other_l_s = student.l, other_both = both;  // without the peak
    if (peak.exists()) join(peak);
    RowResult r;
    r.d = result();
    if (student.l == 0.0 || teacher.l == 0.0) return r;
    r.sum_g = -0.5 * other_both / std::sqrt(student.l * teacher.l);
    if (peak.finite()) {
      const double q = student.mass(peak.s, 2.0 * half) / student.l, p = teacher.mass(peak.t, 2.0 * half) / teacher.l;
      const double c = 0.5 * std::sqrt(p / q);
      r.set_gradient(peak.index, q, c, r.sum_g + c * other_l_s / student.l);
    }
    return r;
  }
};

}  // namespace ADAKD_ISA
}  // namespace adakd
