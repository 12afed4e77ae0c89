// `token_divergence`: D(p^τ, q^τ) of a token, Σg of equation (10), the peak's gradient and the normalisers at
// temperature τ.
//
// The KL family and the Hellinger distance read the row once. The others read it twice, the second time from the cache
// where the row fits into it.
#pragma once

#include "hellinger.h"
#include "two_sweeps.h"

namespace adakd {
namespace ADAKD_ISA {

template <class S> void store_result(const DivergenceCall& call, int64_t n, const RowResult& r) {
  static_cast<S*>(call.d)[n] = saturated<S>(r.d);
  static_cast<S*>(call.sum_g)[n] = saturated<S>(r.sum_g);
  call.peak[n] = r.peak;
  static_cast<S*>(call.peak_grad)[n] = saturated<S>(r.peak_grad);
}

// The fold of a divergence that takes one sweep.
template <class D> struct OneSweep { using Fold = void; };
template <> struct OneSweep<Tag<ForwardKL>> { using Fold = KLFold<true, false>; };
template <> struct OneSweep<Tag<ReverseKL>> { using Fold = KLFold<false, true>; };
template <> struct OneSweep<Tag<Jeffreys>> { using Fold = KLFold<true, true>; };
template <> struct OneSweep<Tag<Hellinger>> { using Fold = HellingerFold<true>; };

// What the second sweep of a row left for its gradient (TermsFold): room for a number of each entry, and how many of
// them are there.
struct Kept {
  float* numbers = nullptr;
  int64_t entries = 0;
};

template <class V> void token_divergence_row(const DivergenceCall& call, int64_t n, Kept& kept) {
  using S = Scalar<V>;
  if (!call.mask[n]) {
    store_result<S>(call, n, {});
    store_masked_out<S>(call.out, n);
    return;
  }
  const Rows& rows = call.rows;
  const Row s = row_of(rows.student, n, rows.tokens), t = row_of(rows.teacher, n, rows.tokens);
  const double scale = scale_of<V>(temperature_of<S>(call.temperature, n));
  // The sweep that finds the normalisers, and stores them.
  const auto sweep = [&](auto& fold) {
    Sweep<V, std::decay_t<decltype(fold)>>(s, t, fold).range(0, rows.vocab);
    const RowResult found = fold.finish();
    fold.template store<S>(call.out, n);
    return found;
  };
  RowResult result;
  with_divergence(call.divergence, [&](auto tag) {
    using D = decltype(tag);
    if constexpr (D::template Of<V>::kTwoSweeps) {
      NormalizerFold first(scale);
      sweep(first);
      if (first.empty()) return;  // D and its gradient are 0
      // As stored, in the accumulation type, because the backward has no more digits.
      const auto stored = [n](const void* array) { return number_of<S>(array, n); };
      const LogNormalizers normalizers = LogNormalizers::from(scale, stored(call.out.max_s), stored(call.out.sum_s),
                                                              stored(call.out.max_t), stored(call.out.sum_t));
      TermsFold<D> terms(normalizers, call.alpha, call.beta);
      if (D::template Of<V>::kSign) terms.template take_sign<V>(first);
      terms.kept = kept.numbers;
      Sweep<V, TermsFold<D>>(s, t, terms).range(0, rows.vocab, first.peak.index);
      if (D::template Of<V>::kKeeps) kept.entries = terms.kept_entries;
      result = terms.template result<V>(first);
    } else {
      using Fold = typename OneSweep<D>::Fold;
      static_assert(!std::is_void_v<Fold>, "a divergence of one sweep needs a fold in OneSweep, others say kTwoSweeps");
      // The test again: without it the compiler would report the void variable beside the assertion.
      if constexpr (!std::is_void_v<Fold>) {
        Fold fold(scale);
        result = sweep(fold);
      }
    }
  });
  store_result<S>(call, n, result);
}

}  // namespace ADAKD_ISA
}  // namespace adakd
