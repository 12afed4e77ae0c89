// `token_terms`: Σf and Σ (g + c·q) of a token over a part of the vocabulary, from the normalisers of its whole rows.
// Each logit is read once.
#pragma once

#include "two_sweeps.h"

namespace adakd {
namespace ADAKD_ISA {

template <class V> void token_terms_row(const TermsCall& call, int64_t n) {
  using S = Scalar<V>;
  double f = 0.0, g = 0.0;
  const auto given = [n](const void* array) { return number_of<S>(array, n); };
  if (call.mask[n] && given(call.in.sum_s) != 0.0 && given(call.in.sum_t) != 0.0) {
    const Rows& rows = call.rows;
    const Row s = row_of(rows.student, n, rows.tokens), t = row_of(rows.teacher, n, rows.tokens);
    const double scale = scale_of<V>(temperature_of<S>(call.temperature, n));
    with_divergence(call.divergence, [&](auto tag) {
      using D = decltype(tag);
      if constexpr (D::template Of<V>::kTwoSweeps) {  // the caller hands over no other
        using Fold = TermsFold<D, true>;
        Fold terms(LogNormalizers::from(scale, given(call.in.max_s), given(call.in.sum_s), given(call.in.max_t),
                                        given(call.in.sum_t)),
                   call.alpha, call.beta);
        terms.c = given(call.constant);
        Sweep<V, Fold>(s, t, terms).range(0, rows.vocab, call.peak[n]);
        f = terms.f;
        g = terms.g;
      }
    });
  }
  static_cast<S*>(call.f)[n] = saturated<S>(f);
  static_cast<S*>(call.g)[n] = saturated<S>(g);
}

}  // namespace ADAKD_ISA
}  // namespace adakd
