// The gradient of a token in the student's logits, entry by entry: equation (10), plus that of the cross-entropy.
#pragma once

#include "two_sweeps.h"

namespace adakd {
namespace ADAKD_ISA {

// What the gradient of one token takes besides its logits.
struct TokenNumbers {
  double alpha, beta;
  double scale;               // log2(e)/τ
  double m_s, l_s, m_t, l_t;  // normalisers at temperature τ
  double w, w_sum_g;          // weight/τ, and that times Σg
  double ce_max, ce_factor;   // the student's maximum, and the weight of the cross-entropy over Σ exp(zˢ - ce_max)
  double peak_sign = 0.0;     // for kSign: the sign of log2(q/p) at the peak

  // Finds the sign that the forward took for the peak, and makes w_sum_g that of g + c·q. Most of a row's mass may have
  // the peak's sign, and g - q·Σg of all those entries would then be a small difference. With c·q added to g it is
  // -q·rest, rest = Σ (g + c·q), which the peak's gradient gives with all its digits.
  void take_sign(double sum_g, double peak_logit, double peak_grad) {
    const double rest = -peak_grad * l_s / std::exp2((peak_logit - m_s) * scale);
    peak_sign = std::nearbyint(2.0 * (sum_g - rest));  // Σg - rest is -c, here ½, 0 or -½ but for roundings
    w_sum_g = w * rest;
  }

  LogNormalizers normalizers() const { return LogNormalizers::from(scale, m_s, l_s, m_t, l_t); }
};

// The gradient of one token. V: vectors that it is computed in, one at a time or a step of them (X). D: the tag of the divergence, that of None where the
// token is selected for its cross-entropy alone.
template <class V, class D, bool kCrossEntropy> struct Gradient {
  using S = Scalar<V>;
  template <class X> using Divergence = typename D::template Of<X>;
  using InDouble = Gradient<Doubles, D, kCrossEntropy>;
  static constexpr bool kDivergence = !std::is_same<Divergence<V>, None<V>>::value;
  static constexpr bool kKeeps = Divergence<V>::kKeeps;

  const TokenNumbers& numbers;
  Parameters<V> parameters;
  const Frame<V> frame;
  const V w, w_sum_g, ce_max, ce_factor;

  explicit Gradient(const TokenNumbers& x)
      : numbers(x), parameters(x.alpha, x.beta), frame(x.normalizers()),
        w(constant<V>(x.w)), w_sum_g(constant<V>(x.w_sum_g)), ce_max(constant<V>(x.ce_max)),
        ce_factor(constant<V>(x.ce_factor)) {
    parameters.peak_sign = constant<V>(x.peak_sign);
  }

  // ∂L/∂zˢ of an entry that is not the label, whose gradient of the cross-entropy has one more term. `check` is finite
  // only where the entry needs no guard and no number overflowed.
  template <bool kGuarded, class X> ADAKD_INLINE X entry(const X& s, const X& t, X& check) const {
    X gradient = V{};
    check = s;
    if constexpr (kDivergence) {
      const Entry<X> at = frame.template entry<kGuarded>(s, t);
      const Divergence<X> divergence(parameters);
      if constexpr (kKeeps) {
        const X q = mass_of(at.log_q);
        gradient = divergence.gradient(q, divergence.kept(at), w, w_sum_g);
      } else {
        gradient = divergence.gradient(at, w, w_sum_g);
      }
      check = Divergence<X>::kUnbounded ? gradient : at.gap;
      if (kGuarded) {
        const X minus_infinity = broadcast<V>(-kInfinity), zero = V{};
        gradient = select((s != minus_infinity) & (t != minus_infinity), gradient, zero);
      }
    }
    return with_cross_entropy(gradient, s);
  }

  // The same bits from what the second sweep kept of the entry. It kept nothing of blocks that need guards.
  template <class X> ADAKD_INLINE X entry_from(const X& s, const X& kept) const {
    return with_cross_entropy(Divergence<X>(parameters).gradient(mass_of(frame.log_q(s)), kept, w, w_sum_g), s);
  }

  // Adds the student's probability at temperature 1, weighted. Nothing guards it: the student's -inf gives 0 here too.
  template <class X> ADAKD_INLINE X with_cross_entropy(const X& gradient, const X& s) const {
    if (!kCrossEntropy) return gradient;
    return fma(mass_of((s - X(ce_max)) * X(constant<V>(kLog2e))), X(ce_factor), gradient);
  }

  // Writes n entries without guards, n a whole number of steps: from what the second sweep kept of them, unless `kept` is
  // null. Returns how many it wrote before the first step that needs guards.
  template <bool kStream, class T> int fast(const T* s, const T* t, T* out, int n, const float* kept) const {
    // A copy on the stack. The compiler has to assume that `out` may overlap *this, and would load its members again
    // after every store.
    Gradient x = *this;
    if constexpr (kKeeps) {
      if (kept != nullptr) return x.template kept_loop<kStream>(s, out, n, kept);
    }
    return unswitched<Divergence<V>>(parameters, [&](const Parameters<V>& known) ADAKD_INLINE_LAMBDA {
      x.parameters = known;
      return x.template fast_loop<kStream>(s, t, out, n);
    });
  }

  // Nothing is stored before its check, because in place a store overwrites the logits that the guarded way would need.
  template <bool kStream, class T> ADAKD_INLINE int fast_loop(const T* s, const T* t, T* out, int n) const {
    for (int i = 0; i < n; i += kStep<V>) {
      const Step<V> zs = load_step<V>(s + i), zt = load_step<V>(t + i);
      Step<V> gradient, check;
      if constexpr (kTogether<V>) {
        gradient = entry<false>(zs, zt, check);
      } else {
        Step<V>::for_each([&](int j) ADAKD_INLINE_LAMBDA {
          gradient.at[j] = entry<false>(zs.at[j], zt.at[j], check.at[j]);
        });
      }
      if (!all_finite(check)) return i;
      store_step<kStream>(out + i, gradient);
    }
    return n;
  }

  template <bool kStream, class T> ADAKD_INLINE int kept_loop(const T* s, T* out, int n, const float* kept) const {
    for (int i = 0; i < n; i += kStep<V>) {
      const Step<V> zs = load_step<V>(s + i);
      const Step<V> from = Step<V>::of([&](int j) ADAKD_INLINE_LAMBDA { return load<V>(kept + i + j * kLanes<V>); });
      Step<V> gradient;
      if constexpr (kTogether<V>) {
        gradient = entry_from(zs, from);
      } else {
        Step<V>::for_each([&](int j) ADAKD_INLINE_LAMBDA { gradient.at[j] = entry_from(zs.at[j], from.at[j]); });
      }
      store_step<kStream>(out + i, gradient);
    }
    return n;
  }

  // Writes n entries with guards, n a whole number of vectors, from scratch memory to scratch memory. Returns
  // whether all came out finite.
  bool guarded(const S* s, const S* t, S* out, int n) const {
    V zero = V{}, sum = zero;
    for (int i = 0; i < n; i += kLanes<V>) {
      V check;
      const V gradient = entry<true>(load<V>(s + i), load<V>(t + i), check);
      sum += gradient * zero;  // 0, or NaN once a gradient is not finite
      store(out + i, gradient);
    }
    return !any(sum != zero);
  }
};

}  // namespace ADAKD_ISA
}  // namespace adakd
