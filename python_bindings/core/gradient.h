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

  template <class V> LogNormalizers normalizers() const { return LogNormalizers::from<V>(scale, m_s, l_s, m_t, l_t); }
};

// The gradient of one token. V: vectors that it is computed in. D: the tag of the divergence, that of None where the
// token is selected for its cross-entropy alone.
template <class V, class D, bool kCrossEntropy> struct Gradient {
  using S = Scalar<V>;
  using Divergence = typename D::template Of<V>;
  using InDouble = Gradient<Doubles, D, kCrossEntropy>;
  static constexpr bool kDivergence = !std::is_same<Divergence, None<V>>::value;

  const TokenNumbers& numbers;
  Parameters<V> parameters;
  const Frame<V> frame;
  const V w, w_sum_g, ce_max, ce_factor;

  explicit Gradient(const TokenNumbers& x)
      : numbers(x), parameters(x.alpha, x.beta), frame(x.template normalizers<V>()),
        w(constant<V>(x.w)), w_sum_g(constant<V>(x.w_sum_g)), ce_max(constant<V>(x.ce_max)),
        ce_factor(constant<V>(x.ce_factor)) {
    parameters.peak_sign = constant<V>(x.peak_sign);
  }

  // ∂L/∂zˢ of an entry that is not the label, whose gradient of the cross-entropy has one more term. `check` is finite
  // only where the entry needs no guard and no number overflowed.
  template <bool kGuarded> ADAKD_INLINE V entry(V s, V t, V& check) const {
    V gradient = V{};
    check = s;
    if constexpr (kDivergence) {
      const Entry<V> at = frame.template entry<kGuarded>(s, t);
      gradient = Divergence(parameters).gradient(at, w, w_sum_g);
      check = Divergence::kUnbounded ? gradient : at.gap;
      if (kGuarded) {
        const V minus_infinity = broadcast<V>(-kInfinity), zero = V{};
        gradient = (s != minus_infinity) & (t != minus_infinity) ? gradient : zero;
      }
    }
    // The student's probability at temperature 1, weighted. Nothing guards it: the student's -inf gives 0 here too.
    if (kCrossEntropy) gradient = fma(exp2((s - ce_max) * constant<V>(kLog2e)), ce_factor, gradient);
    return gradient;
  }

  // Writes n entries without guards, n a whole number of pairs of vectors. Returns how many it wrote before the first
  // pair that needs guards.
  template <bool kStream, class T> int fast(const T* s, const T* t, T* out, int n) const {
    // A copy on the stack. The compiler has to assume that `out` may overlap *this, and would load its members again
    // after every store.
    Gradient x = *this;
    return unswitched<Divergence>(parameters, [&](const Parameters<V>& known) ADAKD_INLINE_LAMBDA {
      x.parameters = known;
      return x.template fast_loop<kStream>(s, t, out, n);
    });
  }

  // Nothing is stored before its check, because in place a store overwrites the logits that the guarded way would need.
  template <bool kStream, class T> ADAKD_INLINE int fast_loop(const T* s, const T* t, T* out, int n) const {
    for (int i = 0; i < n; i += 2 * kLanes<V>) {
      const Pair<V> zs = load_pair(s + i), zt = load_pair(t + i);
      V check_1, check_2;
      const Pair<V> gradient{entry<false>(zs.first, zt.first, check_1), entry<false>(zs.second, zt.second, check_2)};
      if (!all_finite(check_1, check_2)) return i;
      store_pair<kStream>(out + i, gradient);
    }
    return n;
  }

  // Writes n entries with guards, n a whole number of pairs of vectors, from scratch memory to scratch memory. Returns
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
