// The divergences, as X(class of divergence_terms.h, name of adakd_kernels/divergences.py): the one list, in any order,
// from which come the enum, the names and the choice of a class.
#pragma once

#define ADAKD_DIVERGENCES(X)             \
  X(ForwardKL, "forward_kl")             \
  X(ReverseKL, "reverse_kl")             \
  X(Jeffreys, "jeffreys")                \
  X(JensenShannon, "jensen_shannon")     \
  X(SkewForwardKL, "skew_forward_kl")    \
  X(SkewReverseKL, "skew_reverse_kl")    \
  X(TotalVariation, "total_variation")   \
  X(AlphaBeta, "alpha_beta")             \
  X(Hellinger, "hellinger")

namespace adakd {

enum class Divergence {
#define ADAKD_ENUMERATOR(Class, name) k##Class,
  ADAKD_DIVERGENCES(ADAKD_ENUMERATOR)
#undef ADAKD_ENUMERATOR
};

}  // namespace adakd
