// `token_stats`: squared Hellinger distance and normalisers of a token at temperature 1. Each logit is read once.
#pragma once

#include "hellinger.h"

namespace adakd {
namespace ADAKD_ISA {

template <class V> void token_stats_row(const StatsCall& call, int64_t n) {
  using S = Scalar<V>;
  if (!call.mask[n]) {
    static_cast<S*>(call.distance)[n] = 0;
    store_masked_out<S>(call.out, n);
    return;
  }
  const Rows& rows = call.rows;
  const Row s = row_of(rows.student, n, rows.tokens), t = row_of(rows.teacher, n, rows.tokens);
  HellingerFold<false> fold(scale_of<V>(1.0));
  Sweep<V, HellingerFold<false>>(s, t, fold).range(0, rows.vocab);
  static_cast<S*>(call.distance)[n] = static_cast<S>(fold.result());
  fold.template store<S>(call.out, n);
}

}  // namespace ADAKD_ISA
}  // namespace adakd
