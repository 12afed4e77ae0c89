// `token_divergence_backward`: equation (10) for a token, plus the gradient of its cross-entropy where labels are
// given.
//
// p and q are rebuilt from the normalisers. Each logit is read once and each entry written once: past the cache, unless
// the gradient takes the place of the student's logits. At last the peak's entry is written again, because the forward
// knows the gradient there with more digits. Entries of a group with one at -inf are computed again with guards, and in
// double where fp32 does not hold them.
#pragma once

#include "gradient.h"
#include "token_divergence.h"

namespace adakd {
namespace ADAKD_ISA {

// The rows of a token, and what is to be written.
struct TokenRows {
  Row s, t;
  char* out;      // where the gradient's row begins, of the student's type
  int64_t vocab;  // number of common entries
  int64_t label;  // -1 without cross-entropy
  double ce_weight;
  bool in_place;
  Kept kept;
  bool numbers_finite;  // else the whole row takes the guarded way

  // The gradient of the cross-entropy in logit i.
  double cross_entropy_at(int64_t i, const TokenNumbers& x) const {
    if (ce_weight == 0.0) return 0.0;
    return x.ce_factor * std::exp2((entry_of(s, i) - x.ce_max) * kLog2e) - (i == label ? ce_weight : 0.0);
  }
};

// Writes n <= kBlock entries with guards. Returns false, and writes nothing, where fp32 does not hold the gradient. Not
// inlined, because its arrays would lie on the stack of every row.
template <class V, class G> __attribute__((noinline)) bool guarded_entries(const G& gradient, const TokenRows& row,
                                                                           int64_t start, int n) {
  using S = Scalar<V>;
  alignas(64) S wide_s[kBlock], wide_t[kBlock], wide_out[kBlock];
  widen_block<V>(row.s, start, n, wide_s);
  const bool finite = gradient.guarded(wide_s, wide_t, wide_out, widen_block<V>(row.t, start, n, wide_t));
  if (!kIsDouble<V> && !finite) return false;
  if (start <= row.label && row.label < start + n) wide_out[row.label - start] -= static_cast<S>(row.ce_weight);
  narrow_block(wide_out, n, row.s.type, row.out, start);
  return true;
}

// Writes n entries without guards, n a whole number of steps, of rows of unlike types, from copies in fp32. Returns how
// many it wrote before the first step that needs guards. Not inlined, for the same reason.
template <class V, class G> __attribute__((noinline)) int copied_entries(const G& gradient, const TokenRows& row,
                                                                         int64_t start, int n, const float* kept) {
  using S = Scalar<V>;
  alignas(64) S wide_s[kBlock], wide_t[kBlock], wide_out[kBlock];
  const bool wide = row.s.type == Type::kFloat;
  S* const out = wide ? reinterpret_cast<S*>(row.out) + start : wide_out;
  const int done = gradient.template fast<false>(as_scalars<V>(row.s, start, n, wide_s),
                                                 as_scalars<V>(row.t, start, n, wide_t), out, n, kept);
  if (!wide) narrow_block(wide_out, done, row.s.type, row.out, start);
  return done;
}

// Writes the common entries of a row.
template <class V, class G> void gradient_row(const G& gradient, const TokenRows& row) {
  const bool unguarded = row.numbers_finite && !kIsDouble<V>;
  const bool stored = unguarded && readable_as_stored<V>(row.s, row.t);
  // In fp32 first, then in double.
  const auto guarded = [&](int64_t start, int n) {
    if (guarded_entries<V>(gradient, row, start, n)) return;
    guarded_entries<Doubles>(typename G::InDouble(gradient.numbers), row, start, n);
  };
  // Streaming stores need aligned addresses. The entries before the first one are written by the guarded way, unless
  // something is kept of the row, in steps from its beginning: then such a row is stored through the cache.
  const int64_t width = size_of(row.s.type);
  const int64_t head = (kBytes - reinterpret_cast<uintptr_t>(row.out) % kBytes) % kBytes / width;
  const bool through_cache = row.in_place || (head > 0 && row.kept.entries > 0);
  // Returns the number of entries written before the first step that needs guards.
  const auto fast = [&](int64_t start, int n) {
    const float* const kept = start + n <= row.kept.entries ? row.kept.numbers + start : nullptr;
    if constexpr (!kIsDouble<V>) {
      if (!stored) return copied_entries<V>(gradient, row, start, n, kept);
    }
    return as_stored<V>(row.s, row.t, 0, [&](auto entry) {
      using T = decltype(entry);
      const T* s = reinterpret_cast<const T*>(row.s.data) + start;
      const T* t = reinterpret_cast<const T*>(row.t.data) + start;
      T* out = reinterpret_cast<T*>(row.out) + start;
      return through_cache ? gradient.template fast<false>(s, t, out, n, kept)
                           : gradient.template fast<true>(s, t, out, n, kept);
    });
  };
  int64_t start = 0;
  if (stored && !through_cache) {
    start = head < row.vocab ? head : row.vocab;
    if (start > 0) guarded(0, static_cast<int>(start));
  }
  while (start < row.vocab) {
    const int64_t left = row.vocab - start;
    int n = static_cast<int>(left < kBlock ? left : kBlock), done = 0;
    if (unguarded && n >= kStep<V>) {
      n -= n % kStep<V>;
      // The loop without guards does not know the label.
      const bool labelled = start <= row.label && row.label < start + n;
      if (!labelled) done = fast(start, n);
    }
    // The rest of the block, where the loop without guards stopped or did not run.
    if (done < n) guarded(start + done, n - done);
    start += n;
  }
}

// Writes zeros past the cache, in whole vectors where they are aligned.
inline void stream_zeros(char* p, int64_t bytes) {
  int64_t i = (kBytes - reinterpret_cast<uintptr_t>(p) % kBytes) % kBytes;
  i = i < bytes ? i : bytes;
  std::memset(p, 0, i);
  for (; i + kBytes <= bytes; i += kBytes) stream(p + i, Uints{});
  std::memset(p + i, 0, bytes - i);
}

template <class V> TokenNumbers numbers_of(const GradientCall& call, int64_t n, double weight, double ce_weight) {
  using S = Scalar<V>;
  const double tau = temperature_of<S>(call.temperature, n);
  TokenNumbers x;
  x.alpha = call.alpha;
  x.beta = call.beta;
  x.scale = scale_of<V>(tau);
  x.m_s = number_of<S>(call.in.max_s, n);
  x.l_s = number_of<S>(call.in.sum_s, n);
  x.m_t = number_of<S>(call.in.max_t, n);
  x.l_t = number_of<S>(call.in.sum_t, n);
  x.w = weight / tau;
  x.w_sum_g = saturated<double>(x.w * number_of<S>(call.sum_g, n));
  // Without weight the token has no normaliser at temperature 1.
  x.ce_max = ce_weight == 0.0 ? 0.0 : number_of<S>(call.ce_max, n);
  x.ce_factor = ce_weight == 0.0 ? 0.0 : ce_weight / number_of<S>(call.ce_sum, n);
  return x;
}

template <class S> TokenRows rows_of(const GradientCall& call, int64_t n, double weight, double ce_weight,
                                     const TokenNumbers& x) {
  TokenRows row;
  row.s = row_of(call.rows.student, n, call.rows.tokens);
  row.t = row_of(call.rows.teacher, n, call.rows.tokens);
  row.out = row_start(call.grad, n, call.rows.tokens);
  row.vocab = call.rows.vocab;
  row.label = ce_weight == 0.0 ? -1 : call.labels[n];
  row.ce_weight = ce_weight;
  row.in_place = call.grad.data == call.rows.student.data;
  // kLeastLog is the most negative number that a divergence multiplies the weight with.
  const bool weights =
      std::isfinite(static_cast<S>(kLeastLog * x.w) + static_cast<S>(x.w_sum_g) + x.ce_factor + x.ce_max);
  // Without weight the token has no normalisers at temperature τ.
  row.numbers_finite = weights && (weight == 0.0 || std::isfinite(x.m_s + x.m_t + std::log2(x.l_s) + std::log2(x.l_t)));
  return row;
}

template <class V> void token_divergence_backward_row(const GradientCall& call, int64_t n, const Kept& kept) {
  using S = Scalar<V>;
  const int64_t vocab = call.rows.vocab, width = size_of(call.rows.student.type);
  const double weight = number_of<S>(call.weight, n), ce_weight = call.labels ? number_of<S>(call.ce_weight, n) : 0.0;
  if (weight == 0.0 && ce_weight == 0.0) {
    stream_zeros(row_start(call.grad, n, call.rows.tokens), call.student_vocab * width);
    end_of_stream();
    return;
  }
  TokenNumbers x = numbers_of<V>(call, n, weight, ce_weight);
  TokenRows row = rows_of<S>(call, n, weight, ce_weight, x);
  row.kept = kept;
  const int64_t peak = weight == 0.0 ? -1 : call.peak[n];
  const double peak_grad = peak < 0 ? 0.0 : number_of<S>(call.peak_grad, n);
  // Computed before the row is written, which in place overwrites the peak's logit.
  const S at_peak = peak < 0 ? S{0} : static_cast<S>(x.w * peak_grad + row.cross_entropy_at(peak, x));
  // With its own loop for each divergence, with and without cross-entropy.
  const auto write_row = [&](auto tag) {
    using D = decltype(tag);
    if constexpr (D::template Of<V>::kSign) {
      if (peak >= 0) x.take_sign(number_of<S>(call.sum_g, n), entry_of(row.s, peak), peak_grad);
    }
    if (ce_weight == 0.0) {
      gradient_row<V>(Gradient<V, D, false>(x), row);
    } else {
      gradient_row<V>(Gradient<V, D, true>(x), row);
    }
  };
  weight == 0.0 ? write_row(Tag<None>{}) : with_divergence(call.divergence, write_row);
  // Entries that only the student's vocabulary has get gradient 0.
  std::memset(row.out + vocab * width, 0, (call.student_vocab - vocab) * width);
  end_of_stream();
  if (peak >= 0) narrow_block(&at_peak, 1, call.rows.student.type, row.out, peak);
}

}  // namespace ADAKD_ISA
}  // namespace adakd
