// The kernels of one instruction set. Compiled once for each, with ADAKD_ISA naming it.
#include "token_divergence.h"
#include "token_divergence_backward.h"
#include "token_kl.h"
#include "token_stats.h"
#include "token_terms.h"

namespace adakd {
namespace ADAKD_ISA {
namespace {

bool in_double(const Rows& rows) { return rows.student.type == Type::kDouble || rows.teacher.type == Type::kDouble; }

void stats(const StatsCall& call, int64_t n) {
  const FlushSubnormals flush;
  in_double(call.rows) ? token_stats_row<Doubles>(call, n) : token_stats_row<Floats>(call, n);
}

void divergence_keeping(const DivergenceCall& call, int64_t n, Kept& kept) {
  const FlushSubnormals flush;
  in_double(call.rows) ? token_divergence_row<Doubles>(call, n, kept) : token_divergence_row<Floats>(call, n, kept);
}

void divergence(const DivergenceCall& call, int64_t n) {
  Kept nothing;
  divergence_keeping(call, n, nothing);
}

void kl(const KlCall& call, int64_t n) {
  const FlushSubnormals flush;
  in_double(call.rows) ? token_kl_row<Doubles>(call, n) : token_kl_row<Floats>(call, n);
}

void terms(const TermsCall& call, int64_t n) {
  const FlushSubnormals flush;
  in_double(call.rows) ? token_terms_row<Doubles>(call, n) : token_terms_row<Floats>(call, n);
}

void backward_from(const GradientCall& call, int64_t n, const Kept& kept) {
  const FlushSubnormals flush;
  in_double(call.rows) ? token_divergence_backward_row<Doubles>(call, n, kept)
                       : token_divergence_backward_row<Floats>(call, n, kept);
}

void backward(const GradientCall& call, int64_t n) { backward_from(call, n, {}); }

void with_gradient(const WithGradientCall& call, int64_t n, float* scratch) {
  Kept kept{scratch};
  divergence_keeping(call.divergence, n, kept);
  backward_from(call.gradient, n, kept);
}

bool takes_two_sweeps(Divergence name) {
  bool two = false;
  with_divergence(name, [&](auto tag) { two = decltype(tag)::template Of<Floats>::kTwoSweeps; });
  return two;
}

// y[i] = function(x[i]); the last vector is filled up with ones. The tests check exp2, mass_of and log2 by it.
template <class Function> void map(Function function, const float* x, float* y, int64_t n) {
  constexpr int kStep = kLanes<Floats>;
  for (int64_t i = 0; i < n; i += kStep) {
    const int left = static_cast<int>(n - i < kStep ? n - i : kStep);
    Floats v = broadcast<Floats>(1.0f);
    std::memcpy(&v, x + i, left * sizeof(float));
    v = function(v);
    std::memcpy(y + i, &v, left * sizeof(float));
  }
}

void map_exp2(const float* x, float* y, int64_t n) { map([](Floats v) { return exp2(v); }, x, y, n); }
void map_mass(const float* x, float* y, int64_t n) { map([](Floats v) { return mass_of(v); }, x, y, n); }
void map_log2(const float* x, float* y, int64_t n) { map([](Floats v) { return log2(v); }, x, y, n); }

}  // namespace

// Two macros, so that ADAKD_ISA is replaced by its value before it becomes a string. `extern` because a constant would
// be visible in this file only.
#define ADAKD_NAME_OF(isa) #isa
#define ADAKD_NAME(isa) ADAKD_NAME_OF(isa)
extern const Kernels table;
const Kernels table{ADAKD_NAME(ADAKD_ISA), stats,    divergence,    kl,
                    terms,                 backward, with_gradient, takes_two_sweeps,
                    map_exp2,              map_mass, map_log2};

}  // namespace ADAKD_ISA
}  // namespace adakd
