// Forward and reverse KL of two rows, and their sum, in one sweep (docs/maths.md, section 5.2); without either, the
// normalisers alone.
//
// Sums run over all entries but the peak. Masses are relative to two anchors: the student's is its peak's logit, the
// teacher's is a logit near its maximum. Logarithms are to base 2 until the results, which are in nats.
#pragma once

#include "sweep.h"

namespace adakd {
namespace ADAKD_ISA {

// kLost: the mass of the student's entries at which the teacher has -inf gets a sum of its own, `lost_s`. As the
// difference student.l - keep_s of two rounded sums it would lose its digits where it is small.
template <bool kForward, bool kReverse, bool kLost = false> struct KLFold {
  static constexpr bool kPeak = true, kGaps = kForward || kReverse;

  double scale;
  RunningNormalizer student{}, teacher{};
  double keep_s = 0.0, keep_t = 0.0;  // mass of the finite entries, a part of student.l and teacher.l
  double lost_s = 0.0;                // with kLost, the other part of student.l
  // Σ a·gap and Σ b·gap over the finite entries, a and b the masses. gap is that of the logits relative to the anchors,
  // (s - student.anchor) - (t - teacher.anchor), so that log2(q/p) is scale·gap plus a constant of the row.
  double gap_s = 0.0, gap_t = 0.0;
  Peak peak{};
  NewPeak new_peak{};

  // What a row has at its peak and in all, known after the sweep.
  struct PeakMasses {
    double l_s = 0.0, l_t = 0.0;  // mass of all entries, with the peak
    double a = 0.0, b = 0.0;      // mass of the peak in either row
    double other_q = 0.0;         // Σ q over the other entries
    double log_q = 0.0;           // log2 q of the peak
    double gap = 0.0;             // log2(q/p) of the peak
  };
  PeakMasses masses{};  // set by finish()

  explicit KLFold(double scale) : scale(scale) {}

  // The sums of a block's first `added` entries, as above. The maxima are those of one chain more, where that one has a
  // logit beyond the peak's limit.
  struct Sums {
    double l_s, l_t, keep_s, keep_t, gap_s, gap_t;
    Maxima max;
    int added;
    double lost_s = 0.0;  // without guards every entry is finite
    // Not so where an entry at -inf met no guard, or a number left the type's range.
    bool all_finite() const { return std::isfinite(l_s + l_t + gap_s + gap_t); }
  };

  // The same sums in the loop. Those that nobody reads are removed by the compiler.
  template <class V> struct ChainSums {
    ChainSum<V> l_s, l_t, keep_s, keep_t, gap_s, gap_t, lost_s;
  };

  template <bool kGuarded, class V, class T> Sums sums(const Block<T>& block) const {
    const V k = constant<V>(scale), m_s = constant<V>(student.origin()), m_t = constant<V>(teacher.origin());
    const V limit = broadcast<V>(peak.template limit<Scalar<V>>(scale));
    Total<V> l_s, l_t, gap_s, gap_t, keep_s, keep_t, lost_s;
    ChainSums<V> sum;
    V max_s = broadcast<V>(-kInfinity), max_t = max_s;
    const auto add = [&](const auto& s, const auto& t, int i) ADAKD_INLINE_LAMBDA {
      using X = std::decay_t<decltype(s)>;
      max_s = max(s, max_s);
      max_t = max(t, max_t);
      const X minus_infinity = broadcast<V>(-kInfinity), zero = V{}, one = constant<V>(1.0);
      const X x = below<kGuarded, X>(s, m_s), y = below<kGuarded, X>(t, m_t);
      const X a = mass_of(X(x * k)), b = mass_of(X(y * k));
      // Multiply-adds by 1 instead of additions: exp2 keeps AMD's units for additions busy with its rounding and
      // scaling.
      sum.l_s.add_product(a, one, i);
      sum.l_t.add_product(b, one, i);
      if constexpr (kGaps && kGuarded) {
        const Mask<X> finite = (s != minus_infinity) & (t != minus_infinity);
        const X a_finite = select(finite, a, zero), b_finite = select(finite, b, zero);
        const X gap = select(finite, x - y, zero);
        sum.keep_s.add(a_finite, i);
        sum.keep_t.add(b_finite, i);
        if (kLost) sum.lost_s.add(select(t != minus_infinity, zero, a), i);
        sum.gap_s.add_product(a_finite, gap, i);
        sum.gap_t.add_product(b_finite, gap, i);
      } else if constexpr (kGaps) {
        // An entry at -inf makes the gap infinite and the sum infinite or NaN, which all_finite() sees.
        const X gap = x - y;
        if (kReverse) sum.gap_s.add_product(a, gap, i);
        if (kForward) sum.gap_t.add_product(b, gap, i);
      }
    };
    const int added = for_each_step<V>(block, add, [&]() ADAKD_INLINE_LAMBDA {
      if (any(max_s > limit)) return false;
      l_s.take(sum.l_s);
      l_t.take(sum.l_t);
      if (kReverse || (kGaps && kGuarded)) gap_s.take(sum.gap_s);
      if (kForward || (kGaps && kGuarded)) gap_t.take(sum.gap_t);
      if (kGaps && kGuarded) keep_s.take(sum.keep_s);
      if (kGaps && kGuarded) keep_t.take(sum.keep_t);
      if (kLost && kGuarded) lost_s.take(sum.lost_s);
      return true;
    });
    Sums x{l_s.value(),   l_t.value(), 0.0, 0.0, gap_s.value(), gap_t.value(), {max_lanes(max_s), max_lanes(max_t)},
           added};
    // Without guards every entry is finite, or the block is folded again.
    x.keep_s = kGaps && kGuarded ? keep_s.value() : x.l_s;
    x.keep_t = kGaps && kGuarded ? keep_t.value() : x.l_t;
    if (kLost && kGuarded) x.lost_s = lost_s.value();
    return x;
  }

  // Adds a block, up to a new peak, unless it needs guards. The anchors are guessed from what came before, so most blocks
  // are read once. A block whose teacher passes the guess by far is read again with a new anchor.
  template <bool kGuarded, class V, class T> Added add(const Block<T>& block) {
    if (!peak.exists() || teacher.anchor == -kInfinity) {
      const Maxima first = block_maxima<V>(block.template head<V>());
      raise_teacher(first.t);
      if (first.s > peak.template limit<Scalar<V>>(scale)) {
        new_peak = {0, first.s};
        return Added::kNewPeak;
      }
    }
    Sums x = sums<kGuarded, V>(block);
    if (raise_teacher(x.max.t)) x = sums<kGuarded, V>(block);
    // There is no way after the guarded one in double: NaN then comes from the logits and is added.
    if (!(kGuarded && kIsDouble<V>) && !x.all_finite()) return Added::kRetry;
    student.l += x.l_s;
    teacher.l += x.l_t;
    keep_s += x.keep_s;
    keep_t += x.keep_t;
    lost_s += x.lost_s;
    gap_s += x.gap_s;
    gap_t += x.gap_t;
    student.include(x.max.s);
    teacher.include(x.max.t);
    new_peak = {x.added, x.max.s};
    return x.added < block.n ? Added::kNewPeak : Added::kYes;
  }

  bool has_no_mass(double logit) const {
    return student.has_no_mass(logit, scale) && teacher.has_no_mass(logit, scale);
  }

  // Moves the teacher's anchor to this logit if it is too low for it. Returns whether it moved.
  bool raise_teacher(double logit) {
    if (!teacher.too_low(logit, scale)) return false;
    shift_gaps(0.0, apart(teacher.origin(), logit));
    const double f = teacher.move(logit, scale);
    keep_t *= f;
    gap_t *= f;
    return true;
  }

  // Moves the gaps of all entries so far to new anchors. down_s and down_t are what a logit's difference to its anchor
  // changes by, in the student and in the teacher, so every gap changes by down_s - down_t.
  void shift_gaps(double down_s, double down_t) {
    gap_s += keep_s == 0.0 ? 0.0 : keep_s * (down_s - down_t);
    gap_t += keep_t == 0.0 ? 0.0 : keep_t * (down_s - down_t);
  }

  // Makes `next` the peak and the student's anchor. The former peak joins the other entries.
  void take_peak(const Peak& next) {
    shift_gaps(apart(student.origin(), next.s), 0.0);
    const double f = student.move(next.s, scale);
    keep_s *= f;
    lost_s *= f;
    gap_s *= f;
    if (peak.exists()) {
      const double a = student.mass(peak.s, scale), b = teacher.mass(peak.t, scale);
      student.l += a;
      teacher.l += b;
      if (peak.finite()) {
        keep_s += a;
        keep_t += b;
        gap_s += a * gap_of(peak);
        gap_t += b * gap_of(peak);
      } else {
        lost_s += a;
      }
    }
    peak = next;
    student.include(next.s);
    teacher.include(next.t);
  }

  double gap_of(const Peak& at) const { return apart(apart(at.s, student.origin()), apart(at.t, teacher.origin())); }

  PeakMasses measure() const {
    PeakMasses m;
    m.l_s = student.l;
    m.l_t = teacher.l;
    if (peak.exists()) {
      m.a = 1.0;  // its logit is the anchor
      m.b = teacher.mass(peak.t, scale);
      m.l_s += m.a;
      m.l_t += m.b;
      m.other_q = student.l / m.l_s;
    }
    if (peak.finite()) {
      // log2 of a probability near 1, from the mass of the others: log(1 + x) of a small x keeps all its digits.
      m.log_q = -std::log1p(student.l / m.a) / kLn2;
      const double log_p = teacher.l < m.b ? -std::log1p(teacher.l / m.b) / kLn2
                                           : apart(peak.t, teacher.origin()) * scale - std::log2(m.l_t);
      m.gap = apart(m.log_q, log_p);
    }
    return m;
  }

  // Whether one of the rows has no mass: nothing but -inf.
  bool empty() const { return (student.l == 0.0 && !peak.exists()) || (teacher.l == 0.0 && !peak.finite()); }

  // Stores the normalisers of token n with the peak in them. finish() comes first.
  template <class S> void store(const Normalizers& out, int64_t n) const {
    RunningNormalizer all_s = student, all_t = teacher;
    all_s.l = masses.l_s;
    all_t.l = masses.l_t;
    store_normalizer<S>(all_s, scale, out.max_s, out.sum_s, n);
    store_normalizer<S>(all_t, scale, out.max_t, out.sum_t, n);
  }

  // D, Σg and the peak's gradient; zeros where a row is empty.
  RowResult finish() {
    masses = measure();
    return kGaps ? result<kForward, kReverse>() : RowResult{};
  }

  // The same of both divergences, each by itself, with Σ p over the finite entries and Σ q over the others.
  struct Apart {
    RowResult forward, reverse;
    double kept = 0.0, lost = 0.0;
  };
  Apart finish_apart() {
    static_assert(kForward && kReverse && kLost);
    masses = measure();
    Apart x{result<true, false>(), result<false, true>()};
    if (!empty()) x.kept = (keep_t + masses.b) / masses.l_t;
    if (masses.l_s != 0.0) x.lost = q_lost();
    return x;
  }

 private:
  template <bool kF, bool kR> RowResult result() const {
    if (empty()) return {};
    return peak.finite() ? result_with_peak<kF, kR>() : result_without_peak<kF, kR>();
  }

  // Σ q over the entries that are not finite, of which the peak is one where the teacher has -inf there.
  double q_lost() const {
    const double others = kLost ? lost_s : student.l - keep_s;
    return (peak.finite() ? others : others + masses.a) / masses.l_s;
  }

  // Where the teacher has -inf at the peak, the peak's gradient is 0 and nothing cancels. D comes from the sums as they
  // are.
  template <bool kF, bool kR> RowResult result_without_peak() const {
    const PeakMasses& m = masses;
    const double log_ratio = std::log2(m.l_t) - std::log2(m.l_s);
    const double reverse = (scale * gap_s + keep_s * log_ratio) / m.l_s * kLn2, forward = forward_of(log_ratio);
    RowResult r;
    r.d = (kF ? forward : 0.0) + (kR ? reverse : 0.0);
    r.sum_g = (kF ? -keep_t / m.l_t : 0.0) + (kR ? reverse - q_lost() : 0.0);
    return r;
  }

  template <bool kF, bool kR> RowResult result_with_peak() const {
    const PeakMasses& m = masses;
    const double peak_gap = gap_of(peak);
    // Σ q·log(q/p) over the others, less log(q/p) of the peak in each: what reverse KL's gradient at the peak consists
    // of.
    const double reverse = scale * (gap_s - keep_s * peak_gap) / m.l_s * kLn2;
    // Forward KL takes the gaps from the anchors, because near the teacher's most of its mass lies. The constant that
    // they lack has most digits as the peak's log-ratio less the peak's gap, unless both are large.
    constexpr double kFar = 32.0;
    const double log_ratio = std::fabs(peak_gap * scale) < kFar ? m.gap - peak_gap * scale
                                                                : std::log2(m.l_t) - std::log2(m.l_s);
    const double forward = forward_of(log_ratio);
    const double p_over_q = kF ? std::exp2(-m.gap) : 0.0, nats = m.gap * kLn2;
    RowResult r;
    double c = 0.0, rest = 0.0;  // as in RowResult::set_gradient
    if (kR) {
      r.d += reverse + nats * (keep_s + m.a) / m.l_s;
      c -= nats;
      rest += reverse - q_lost();
    }
    if (kF) {
      r.d += forward - nats * m.b / m.l_t;
      c += p_over_q;
      rest += p_over_q * keep_s / m.l_s - keep_t / m.l_t;
    }
    rest += c * q_lost();
    r.set_gradient(peak.index, m.a / m.l_s, c, rest);
    return r;
  }

  // Σ p·log(p/q) over the finite entries beside the peak, from log_ratio = log2(q/p) less scale·gap of any entry.
  double forward_of(double log_ratio) const { return -(scale * gap_t + keep_t * log_ratio) / masses.l_t * kLn2; }
};

}  // namespace ADAKD_ISA
}  // namespace adakd
