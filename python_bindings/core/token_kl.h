// `token_kl`: both KL divergences of a token, each with its peak's gradient, in the sweep that Jeffreys takes; the mass of
// the teacher that D keeps and the mass of the student that it loses; and the normalisers at temperature τ.
#pragma once

#include "kl.h"

namespace adakd {
namespace ADAKD_ISA {

template <class V> void token_kl_row(const KlCall& call, int64_t n) {
  using S = Scalar<V>;
  using Fold = KLFold<true, true, true>;
  typename Fold::Apart found;
  if (call.mask[n]) {
    const Rows& rows = call.rows;
    const Row s = row_of(rows.student, n, rows.tokens), t = row_of(rows.teacher, n, rows.tokens);
    Fold fold(scale_of<V>(temperature_of<S>(call.temperature, n)));
    Sweep<V, Fold>(s, t, fold).range(0, rows.vocab);
    found = fold.finish_apart();
    fold.template store<S>(call.out, n);
  } else {
    store_masked_out<S>(call.out, n);
  }
  const auto put = [n](void* array, double x) { static_cast<S*>(array)[n] = saturated<S>(x); };
  put(call.forward, found.forward.d);
  put(call.kept, found.kept);
  put(call.reverse, found.reverse.d);
  put(call.lost, found.lost);
  call.peak[n] = found.forward.peak;
  put(call.forward_grad, found.forward.peak_grad);
  put(call.reverse_grad, found.reverse.peak_grad);
}

}  // namespace ADAKD_ISA
}  // namespace adakd
