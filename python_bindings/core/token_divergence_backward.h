// `token_divergence_backward`: equation (10) for a token, plus the gradient of its cross-entropy where labels are given.
//
// p and q are rebuilt from the normalisers. Reads each logit once and writes each entry once, past the cache unless the
// gradient takes the place of the student's logits; then the peak's again, whose gradient the forward knows better.
// Nothing is stored before its logits are known to be finite, so that a group of entries with one at -inf can be computed
// again with guards, and in double where that is not enough, in place too.
#pragma once

#include "two_sweeps.h"

namespace adakd {
namespace ADAKD_ISA {

// What the gradient of one token takes besides its logits.
struct TokenNumbers {
  double alpha, beta, scale, max_s, sum_s, max_t, sum_t, w, w_sum_g, ce_max, ce_factor;
  double own_sign = 0.0;

  // Most of a row's mass may have the peak's sign, and the gradient of all of it is then a small difference: with g lowered
  // by c·q, it is 0 there but for Σ(g + c·q), which the peak's gradient knows with all digits.
  void take_sign(double sum_g, double logit, double peak_grad) {
    const double others = -peak_grad * sum_s / std::exp2((logit - max_s) * scale);
    own_sign = std::nearbyint(2.0 * (sum_g - others));
    w_sum_g = w * others;
  }

  template <class V> Normalized normalized() const { return Normalized::kept<V>(scale, max_s, sum_s, max_t, sum_t); }
};

// The gradient of one token, entry by entry.
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
      : numbers(x), parameters(x.alpha, x.beta), frame(x.template normalized<V>()),
        w(constant<V>(x.w)), w_sum_g(constant<V>(x.w_sum_g)), ce_max(constant<V>(x.ce_max)),
        ce_factor(constant<V>(x.ce_factor)) {
    parameters.own_sign = constant<V>(x.own_sign);
  }

  // ∂L/∂zs of an entry, and in `check` something that is finite only where no guard was needed and nothing overflowed.
  template <bool kGuarded> ADAKD_INLINE V entry(V zs, V zt, V& check) const {
    V gradient = V{};
    check = zs;
    if constexpr (kDivergence) {
      const Entry<V> at = frame.template entry<kGuarded>(zs, zt);
      gradient = Divergence(parameters).gradient(at, w, w_sum_g);
      check = Divergence::kUnbounded ? gradient : at.gap;
      if (kGuarded) {
        const V minus_infinity = broadcast<V>(-kInfinity), zero = V{};
        gradient = (zs != minus_infinity) & (zt != minus_infinity) ? gradient : zero;
      }
    }
    if (kCrossEntropy) gradient = fma(exp2((zs - ce_max) * constant<V>(kLog2e)), ce_factor, gradient);
    return gradient;
  }

  // n entries without guards; gives how many were done before the first group that needs them.
  template <bool kStream, class T> int fast(const T* s, const T* t, T* out, int n) const {
    // From a copy: what is stored could be a member of *this, for all that the compiler knows, and would be loaded again.
    Gradient x = *this;
    return unswitched<Divergence>(parameters, [&](const Parameters<V>& known) ADAKD_INLINE_LAMBDA {
      x.parameters = known;
      return x.template fast_loop<kStream>(s, t, out, n);
    });
  }

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

  // n entries, a multiple of a pair of vectors, from scratch memory to scratch memory; whether all came out finite.
  bool guarded(const S* s, const S* t, S* out, int n) const {
    V zero = V{}, sum = zero;
    for (int i = 0; i < n; i += kLanes<V>) {
      V check;
      const V gradient = entry<true>(load<V>(s + i), load<V>(t + i), check);
      sum += gradient * zero;  // 0, or NaN
      store(out + i, gradient);
    }
    return !any(sum != zero);
  }
};

struct OneRow {
  Row s, t;
  char* out;
  int64_t vocab;
  int64_t label;  // -1: none
  double ce_weight;
  bool in_place, finite;

  // The gradient of the cross-entropy in one logit.
  double cross_entropy_at(int64_t i, const TokenNumbers& x) const {
    if (ce_weight == 0.0) return 0.0;
    return x.ce_factor * std::exp2((entry_of(s, i) - x.ce_max) * kLog2e) - (i == label ? ce_weight : 0.0);
  }
};

// n entries with guards, widened. Not inlined: its arrays would be on the stack of every row.
template <class V, class G> __attribute__((noinline)) bool guarded_entries(const G& gradient, const OneRow& row,
                                                                           int64_t start, int n) {
  using S = Scalar<V>;
  alignas(64) S wide_s[kBlock], wide_t[kBlock], wide_out[kBlock];
  widen_block<V>(row.s, start, n, wide_s);
  const bool finite = gradient.guarded(wide_s, wide_t, wide_out, widen_block<V>(row.t, start, n, wide_t));
  if (sizeof(S) == 4 && !finite) return false;
  if (start <= row.label && row.label < start + n) wide_out[row.label - start] -= static_cast<S>(row.ce_weight);
  narrow_block(wide_out, n, row.s.type, row.out, start);
  return true;
}

template <class V, class G> void gradient_row(const G& gradient, const OneRow& row) {
  constexpr int kStep = 2 * kLanes<V>;
  const bool direct = row.finite && directly<V>(row.s, row.t, false, [](auto) { return true; });
  const auto guarded = [&](int64_t start, int n) {
    if (guarded_entries<V>(gradient, row, start, n)) return;
    guarded_entries<Doubles>(typename G::InDouble(gradient.numbers), row, start, n);
  };
  const auto fast = [&](int64_t start, int n) {
    return directly<V>(row.s, row.t, 0, [&](auto entry) {
      using T = decltype(entry);
      const T* s = reinterpret_cast<const T*>(row.s.data) + start;
      const T* t = reinterpret_cast<const T*>(row.t.data) + start;
      T* out = reinterpret_cast<T*>(row.out) + start;
      return row.in_place ? gradient.template fast<false>(s, t, out, n) : gradient.template fast<true>(s, t, out, n);
    });
  };
  int64_t start = 0;
  if (direct) {
    // Streaming stores need whole lines: up to the first one, entry by entry.
    const int64_t width = size_of(row.s.type);
    const int64_t head = (kBytes - reinterpret_cast<uintptr_t>(row.out) % kBytes) % kBytes / width;
    start = head < row.vocab ? head : row.vocab;
    if (start > 0) guarded(0, static_cast<int>(start));
  }
  while (start < row.vocab) {
    const int64_t left = row.vocab - start;
    int n = static_cast<int>(left < kBlock ? left : kBlock), done = 0;
    if (direct && n >= kStep) {
      n -= n % kStep;
      const bool labelled = start <= row.label && row.label < start + n;
      if (!labelled) done = fast(start, n);
    }
    if (done < n) guarded(start + done, n - done);
    start += n;
  }
}

// `bytes` zeros, past the cache.
inline void stream_zeros(char* p, int64_t bytes) {
  int64_t i = (kBytes - reinterpret_cast<uintptr_t>(p) % kBytes) % kBytes;
  i = i < bytes ? i : bytes;
  std::memset(p, 0, i);
  for (; i + kBytes <= bytes; i += kBytes) stream(p + i, Uints{});
  std::memset(p + i, 0, bytes - i);
}

template <class V> void token_divergence_backward_row(const GradientCall& call, int64_t n) {
  using S = Scalar<V>;
  const auto number = [n](const void* array) -> double { return static_cast<const S*>(array)[n]; };
  const Rows& rows = call.rows;
  const int64_t width = size_of(rows.student.type);
  char* const out = row_start(call.grad, n, rows.tokens);
  const double weight = number(call.weight), ce_weight = call.labels ? number(call.ce_weight) : 0.0;
  if (weight == 0.0 && ce_weight == 0.0) {
    stream_zeros(out, call.student_vocab * width);
    end_of_stream();
    return;
  }
  const double tau = temperature_of<S>(call.temperature, n), w = weight / tau;
  TokenNumbers x{call.alpha,
                       call.beta,
                       scale_of<V>(tau),
                       number(call.in.max_s),
                       number(call.in.sum_s),
                       number(call.in.max_t),
                       number(call.in.sum_t),
                       w,
                       saturated<double>(w * number(call.sum_g)),
                       ce_weight == 0.0 ? 0.0 : number(call.ce_max),
                       ce_weight == 0.0 ? 0.0 : ce_weight / number(call.ce_sum)};
  const OneRow row{row_of(rows.student, n, rows.tokens),
                   row_of(rows.teacher, n, rows.tokens),
                   out,
                   rows.vocab,
                   ce_weight == 0.0 ? -1 : call.labels[n],
                   ce_weight,
                   call.grad.data == rows.student.data,
                   std::isfinite(static_cast<S>(kLeastLog * x.w) + static_cast<S>(x.w_sum_g) + x.ce_factor + x.ce_max) &&
                       (weight == 0.0 || std::isfinite(x.max_s + x.max_t + std::log2(x.sum_s) + std::log2(x.sum_t)))};
  const int64_t peak = weight == 0.0 ? -1 : call.peak[n];
  // In place, the peak's logit is gone after the row.
  S at_peak = peak < 0 ? S{0} : static_cast<S>(w * number(call.peak_grad) + row.cross_entropy_at(peak, x));
  const auto write_row = [&](auto tag) {
    using D = decltype(tag);
    if constexpr (D::template Of<V>::kSign) {
      if (peak >= 0) x.take_sign(number(call.sum_g), entry_of(row.s, peak), number(call.peak_grad));
    }
    if (ce_weight == 0.0) {
      gradient_row<V>(Gradient<V, D, false>(x), row);
    } else {
      gradient_row<V>(Gradient<V, D, true>(x), row);
    }
  };
  weight == 0.0 ? write_row(Tag<None>{}) : with_divergence(call.divergence, write_row);
  std::memset(out + rows.vocab * width, 0, (call.student_vocab - rows.vocab) * width);
  end_of_stream();
  if (peak >= 0) narrow_block(&at_peak, 1, rows.student.type, out, peak);
}

}  // namespace ADAKD_ISA
}  // namespace adakd
