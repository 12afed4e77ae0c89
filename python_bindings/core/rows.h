// What the kernels share: where a row lies, reading a part of it in another type, and the running normaliser of a row.
#pragma once

#include <limits>
#include <type_traits>

#include "exp_log.h"
#include "kernels.h"

namespace adakd {
namespace ADAKD_ISA {

// Entries of a block. A row is folded block by block, and 4096 entries of both rows stay in the nearest caches, because
// some blocks are read a second time.
constexpr int kBlock = 4096;
constexpr float kInfinity = __builtin_inff();
constexpr double kLn2 = 0.69314718055994530942;
constexpr double kLog2e = 1.44269504088896340736;
// Lower bound of differences of fp64 logits. Sums of such differences, and their products with 0, stay finite.
constexpr double kLowest = -1.0e290;

// Where a token's logits begin. The vocabulary is contiguous.
struct Row {
  const char* data;
  Type type;
};

inline int64_t size_of(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }

// Token n is row (n / L, n % L) of the (B, L, V) logits, with L = tokens.
inline char* row_start(const Logits& logits, int64_t n, int64_t tokens) {
  const int64_t entry = (n / tokens) * logits.stride_b + (n % tokens) * logits.stride_l;
  return static_cast<char*>(logits.data) + entry * size_of(logits.type);
}

inline Row row_of(const Logits& logits, int64_t n, int64_t tokens) {
  return {row_start(logits, n, tokens), logits.type};
}

// Calls use(entry), with an entry of the rows' type, where load_step reads both rows as they are stored: into vectors
// of floats, from rows of one type. For other pairs of rows it returns `otherwise`, and the caller has to widen them.
template <class V, class Result, class Use>
inline Result as_stored(const Row& s, const Row& t, Result otherwise, Use use) {
  if constexpr (!kIsDouble<V>) {
    if (s.type != t.type) return otherwise;
    if (s.type == Type::kFloat) return use(float{});
    if (s.type == Type::kBf16) return use(Bf16{});
    if constexpr (kConvertsHalf) {
      if (s.type == Type::kHalf) return use(Half{});
    }
  }
  return otherwise;
}

template <class V> inline bool readable_as_stored(const Row& s, const Row& t) {
  return as_stored<V>(s, t, false, [](auto) { return true; });
}

template <class T, class S> inline void widen_entries(const char* data, int64_t start, int n, S* out) {
  const T* p = reinterpret_cast<const T*>(data) + start;
  int i = 0;
  if constexpr (kConvertsHalf && std::is_same_v<T, Half> && std::is_same_v<S, float>) {
    for (constexpr int kPair = 2 * kLanes<Floats>; i + kPair <= n; i += kPair) {
      const Pair<Floats> x = load_pair(p + i);
      store(out + i, x.first);
      store(out + i + kLanes<Floats>, x.second);
    }
  }
  for (; i < n; ++i) out[i] = widen(p[i]);
}

// Writes entries start .. start + n of a row to `out`, in the type of V's lanes. Entries of -inf, which have no mass,
// fill the last step. Returns the number of entries with these.
template <class V> inline int widen_block(const Row& row, int64_t start, int n, Scalar<V>* out) {
  switch (row.type) {
    case Type::kFloat: widen_entries<float>(row.data, start, n, out); break;
    case Type::kBf16: widen_entries<Bf16>(row.data, start, n, out); break;
    case Type::kHalf: widen_entries<Half>(row.data, start, n, out); break;
    case Type::kDouble:
      // The kernels never take fp32 vectors for fp64 logits, but the compiler does not know that.
      if (kIsDouble<V>) widen_entries<double>(row.data, start, n, reinterpret_cast<double*>(out));
      break;
  }
  const int padded = (n + kStep<V> - 1) / kStep<V> * kStep<V>;
  for (int i = n; i < padded; ++i) out[i] = -kInfinity;
  return padded;
}

// The same n entries in the type of V's lanes: where they are if they are of that type, else in `copy`.
template <class V> inline const Scalar<V>* as_scalars(const Row& row, int64_t start, int n, Scalar<V>* copy) {
  if (row.type == (kIsDouble<V> ? Type::kDouble : Type::kFloat)) {
    return reinterpret_cast<const Scalar<V>*>(row.data) + start;
  }
  widen_block<V>(row, start, n, copy);
  return copy;
}

inline double entry_of(const Row& row, int64_t i) {
  switch (row.type) {
    case Type::kFloat: return widen(reinterpret_cast<const float*>(row.data)[i]);
    case Type::kBf16: return widen(reinterpret_cast<const Bf16*>(row.data)[i]);
    case Type::kHalf: return widen(reinterpret_cast<const Half*>(row.data)[i]);
    case Type::kDouble: return reinterpret_cast<const double*>(row.data)[i];
  }
  __builtin_unreachable();
}

template <class T, class S> inline void narrow_entries(const S* from, int n, char* data, int64_t start) {
  T* p = reinterpret_cast<T*>(data) + start;
  int i = 0;
  if constexpr (kConvertsHalf && std::is_same_v<T, Half> && std::is_same_v<S, float>) {
    for (constexpr int kPair = 2 * kLanes<Floats>; i + kPair <= n; i += kPair) {
      store_pair<false>(p + i, Pair<Floats>{load<Floats>(from + i), load<Floats>(from + i + kLanes<Floats>)});
    }
  }
  for (; i < n; ++i) narrow(from[i], &p[i]);
}

// Writes n numbers to entries start .. start + n of a row of the given type.
template <class S> inline void narrow_block(const S* from, int n, Type type, char* data, int64_t start) {
  switch (type) {
    case Type::kFloat: narrow_entries<float>(from, n, data, start); break;
    case Type::kBf16: narrow_entries<Bf16>(from, n, data, start); break;
    case Type::kHalf: narrow_entries<Half>(from, n, data, start); break;
    case Type::kDouble: narrow_entries<double>(from, n, data, start); break;
  }
}

// The number of token n in an array of the accumulation type S.
template <class S> inline double number_of(const void* array, int64_t n) { return static_cast<const S*>(array)[n]; }

// The temperature of token n. A subnormal one would read as 0 while FlushSubnormals lives, and 1/τ would not be finite.
template <class S> inline double temperature_of(const void* temperatures, int64_t n) {
  constexpr double kLeast = std::numeric_limits<S>::min();
  const double tau = number_of<S>(temperatures, n);
  return tau < kLeast ? kLeast : tau;
}

// log2(e)/τ in the type of V's lanes: a difference of logits times this is a power of two. It is never 0, because its
// product with -inf would be NaN.
template <class V> inline double scale_of(double tau) {
  constexpr double kLeast = std::numeric_limits<Scalar<V>>::min();
  const double scale = kLog2e / tau;
  return scale < kLeast ? kLeast : static_cast<Scalar<V>>(scale);
}

// z - m. Folds in double are the last to be tried, so that they must not overflow: fp64 logits may lie farther apart
// than the type's range.
template <bool kGuarded, class V> ADAKD_INLINE V below(V z, V m) {
  if constexpr (kGuarded && kIsDouble<V>) return max(broadcast<V>(kLowest), z - m);
  return z - m;
}

// a - b, cut off on both sides for the same reason.
inline double apart(double a, double b) { return min(-kLowest, max(kLowest, a - b)); }

// x in the type that it is stored in. The largest finite number stands for what lies beyond it; NaN stays NaN.
template <class S> inline S saturated(double x) {
  constexpr double kMost = std::numeric_limits<S>::max();
  return static_cast<S>(x > kMost ? kMost : x < -kMost ? -kMost : x);
}

// The normaliser of one row so far. The sum of masses is relative to an anchor, a logit of the row near its maximum, so
// that most blocks that raise the maximum need not be folded again.
struct RunningNormalizer {
  double anchor = -kInfinity;  // -inf before the first finite logit
  double m = -kInfinity;       // the maximum
  double l = 0.0;              // Σ 2^((z - anchor)·scale)

  // What a kernel subtracts from a logit: the anchor, or 0 where -inf - (-inf) would be NaN.
  double origin() const { return anchor == -kInfinity ? 0.0 : anchor; }

  // Whether a block with this maximum needs a higher anchor. Masses up to 2^20, or squares of roots up to 2^20, leave
  // room for their sum in fp32.
  bool too_low(double block_max, double scale) const {
    return block_max > anchor && (anchor == -kInfinity || !((block_max - anchor) * scale <= 20.0));
  }

  // Moves the anchor. Returns the factor by which masses shrink, which the caller applies to its own sums.
  double move(double to, double scale) {
    const double factor = l == 0.0 ? 1.0 : std::exp2((anchor - to) * scale);
    l *= factor;
    anchor = to;
    return factor;
  }

  double mass(double logit, double scale) const {
    return logit == -kInfinity ? 0.0 : std::exp2((logit - origin()) * scale);
  }

  void include(double logit) { m = logit > m ? logit : m; }

  // Whether the mass of a logit is 0 in fp32. Below 2^-400 its square root, which the Hellinger fold takes, is 0 too.
  bool has_no_mass(double logit, double scale) const {
    return anchor != -kInfinity && (logit - anchor) * scale < -400.0;
  }
};

// Stores (m, l) of token n, with l now relative to the maximum m. A row of nothing but -inf gives (-inf, 0).
template <class S>
inline void store_normalizer(const RunningNormalizer& row, double scale, void* max, void* sum, int64_t n) {
  const double relative = row.l == 0.0 ? 0.0 : row.l * std::exp2((row.anchor - row.m) * scale);
  static_cast<S*>(max)[n] = static_cast<S>(row.l == 0.0 ? -kInfinity : row.m);
  static_cast<S*>(sum)[n] = static_cast<S>(relative);
}

// Stores (0, 1) for both rows of a token outside the mask, whose rows are not read.
template <class S> inline void store_masked_out(const Normalizers& out, int64_t n) {
  static_cast<S*>(out.max_s)[n] = static_cast<S*>(out.max_t)[n] = 0;
  static_cast<S*>(out.sum_s)[n] = static_cast<S*>(out.sum_t)[n] = 1;
}

}  // namespace ADAKD_ISA
}  // namespace adakd
