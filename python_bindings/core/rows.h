// What the kernels share: where a row lies, reading a piece of it in another type, and the running normaliser of a row.
#pragma once

#include <limits>
#include <type_traits>

#include "exp_log.h"
#include "kernels.h"

namespace adakd {
namespace ADAKD_ISA {

// A row is taken a block at a time: both sides of a block stay in the nearest caches if it has to be read again.
constexpr int kBlock = 4096;
constexpr float kInfinity = __builtin_inff();
constexpr double kLn2 = 0.69314718055994530942;
constexpr double kLog2e = 1.44269504088896340736;
// Differences of fp64 logits are kept above this, so that their sums and their products with 0 stay finite.
constexpr double kLowest = -1.0e290;

struct Row {
  const char* data;
  Type type;
};

inline int64_t size_of(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }

inline char* row_start(const Logits& z, int64_t n, int64_t tokens) {
  const int64_t entry = (n / tokens) * z.stride_b + (n % tokens) * z.stride_l;
  return static_cast<char*>(z.data) + entry * size_of(z.type);
}

inline Row row_of(const Logits& z, int64_t n, int64_t tokens) { return {row_start(z, n, tokens), z.type}; }

// Where a kernel reads both rows as they are: use(entry), with an entry of their type. Other pairs of rows are widened
// block by block first: `otherwise`.
template <class V, class Use, class Result> inline Result directly(const Row& s, const Row& t, Result otherwise, Use use) {
  if constexpr (sizeof(Scalar<V>) == 4) {
    if (s.type != t.type) return otherwise;
    if (s.type == Type::kFloat) return use(float{});
    if (s.type == Type::kBf16) return use(Bf16{});
    if constexpr (kConvertsHalf) {
      if (s.type == Type::kHalf) return use(Half{});
    }
  }
  return otherwise;
}

template <class T, class S> inline void widen_entries(const char* data, int64_t start, int n, S* out) {
  const T* p = reinterpret_cast<const T*>(data) + start;
  for (int i = 0; i < n; ++i) out[i] = widen(p[i]);
}

// Entries start .. start + n of a row, then -inf up to the next whole pair of vectors; gives the number of both.
template <class V> inline int widen_block(const Row& row, int64_t start, int n, Scalar<V>* out) {
  switch (row.type) {
    case Type::kFloat: widen_entries<float>(row.data, start, n, out); break;
    case Type::kBf16: widen_entries<Bf16>(row.data, start, n, out); break;
    case Type::kHalf: widen_entries<Half>(row.data, start, n, out); break;
    case Type::kDouble:
      // Double logits are computed in double.
      if (sizeof(Scalar<V>) == 8) widen_entries<double>(row.data, start, n, reinterpret_cast<double*>(out));
      break;
  }
  constexpr int kStep = 2 * kLanes<V>;
  const int padded = (n + kStep - 1) / kStep * kStep;
  for (int i = n; i < padded; ++i) out[i] = -kInfinity;
  return padded;
}

// One logit.
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
  for (int i = 0; i < n; ++i) narrow(from[i], &p[i]);
}

template <class S> inline void narrow_block(const S* from, int n, Type type, char* data, int64_t start) {
  switch (type) {
    case Type::kFloat: narrow_entries<float>(from, n, data, start); break;
    case Type::kBf16: narrow_entries<Bf16>(from, n, data, start); break;
    case Type::kHalf: narrow_entries<Half>(from, n, data, start); break;
    case Type::kDouble: narrow_entries<double>(from, n, data, start); break;
  }
}

// The temperature of a token. Subnormal ones read as 0 while FlushSubnormals lives, and 1/τ would not be finite.
template <class S> inline double temperature_of(const void* temperatures, int64_t n) {
  constexpr double kLeast = std::numeric_limits<S>::min();
  const double tau = static_cast<const S*>(temperatures)[n];
  return tau < kLeast ? kLeast : tau;
}

// Powers of two in a unit of logits at temperature τ, as the kernel's type has it. Never 0, for its product with -inf is
// NaN.
template <class V> inline double scale_of(double tau) {
  constexpr double kLeast = std::numeric_limits<Scalar<V>>::min();
  const double scale = kLog2e / tau;
  return scale < kLeast ? kLeast : static_cast<Scalar<V>>(scale);
}

// The distance of two numbers, of which fp64 logits may have one beyond the type.
inline double apart(double a, double b) { return min(-kLowest, max(kLowest, a - b)); }

// A number in the type that it is stored in: the largest finite one stands for those beyond. NaN stays NaN.
template <class S> inline S saturated(double x) {
  constexpr double kMost = std::numeric_limits<S>::max();
  return static_cast<S>(x > kMost ? kMost : x < -kMost ? -kMost : x);
}

// Σ exp of a row so far, relative to an anchor: a logit of the row near its maximum. -inf while none is finite.
struct Side {
  double anchor = -kInfinity, max = -kInfinity, sum = 0.0;

  // What a kernel subtracts from a logit.
  double origin() const { return anchor == -kInfinity ? 0.0 : anchor; }
  // Whether masses with this maximum, at `scale` powers of two a unit, could leave the range of fp32 sums.
  bool too_low(double block_max, double scale) const {
    return block_max > anchor && (anchor == -kInfinity || !((block_max - anchor) * scale <= 20.0));
  }
  // Moves the anchor; gives the factor by which masses shrink.
  double move(double to, double scale) {
    const double factor = sum == 0.0 ? 1.0 : std::exp2((anchor - to) * scale);
    sum *= factor;
    anchor = to;
    return factor;
  }
  // The mass of one logit.
  double mass(double logit, double scale) const {
    return logit == -kInfinity ? 0.0 : std::exp2((logit - origin()) * scale);
  }
  void include(double logit) { max = logit > max ? logit : max; }
  // Whether the mass of a logit is 0 beside the others', and its root, too.
  bool has_no_mass(double logit, double scale) const { return anchor != -kInfinity && (logit - anchor) * scale < -400.0; }
};

// Max and sum of a row as they are kept; an empty row is (-inf, 0). `scale` as in the fold of the sum.
template <class S> inline void store_normalizer(const Side& side, double scale, void* max, void* sum, int64_t n) {
  const double relative = side.sum == 0.0 ? 0.0 : side.sum * std::exp2((side.anchor - side.max) * scale);
  static_cast<S*>(max)[n] = static_cast<S>(side.sum == 0.0 ? -kInfinity : side.max);
  static_cast<S*>(sum)[n] = static_cast<S>(relative);
}

template <class S> inline void store_ignored(const Normalizers& out, int64_t n) {
  static_cast<S*>(out.max_s)[n] = static_cast<S*>(out.max_t)[n] = 0;
  static_cast<S*>(out.sum_s)[n] = static_cast<S*>(out.sum_t)[n] = 1;
}

// The student's most likely entry, or one that is next to it: the only entry that may be confident. What a fold adds up
// for the gradient leaves it out, and so keeps the accuracy of what lies beside it (docs/maths.md, section 4).
struct Peak {
  int64_t index = -1;
  double s = -kInfinity, t = -kInfinity;  // its logits

  bool exists() const { return index >= 0; }
  // Whether it is an entry of D: the teacher may have -inf there.
  bool counts() const { return exists() && t != -kInfinity; }
  // Whether a logit lies so far above that it may be confident: then it is the peak. Otherwise this one has at least an
  // eighth of its mass, and nothing cancels.
  bool passed_by(double logit, double scale) const {
    return logit > s && (!exists() || !((logit - s) * scale <= 3.0));
  }
};

// What a row gives: D and what its gradient needs besides the normalisers.
struct RowResult {
  double d = 0.0, sum_g = 0.0;
  int64_t peak = -1;  // the entry whose gradient is peak_grad instead of (10)'s; -1: none
  double peak_grad = 0.0;

  // From c, for which g + c·q is 0 at the peak, the peak's q, and Σ(g + c·q) over the other entries.
  void set_gradient(int64_t index, double q, double c, double others) {
    sum_g = others - c;
    peak = index;
    peak_grad = -q * others;
  }
};

// What became of a block that a fold was asked to add.
enum class Added {
  kYes,
  kNotInThisType,  // a sum is not finite: an entry at -inf needs guards, or the numbers leave the type's range
  kNewPeak,        // nothing was added: the block's largest logit passes the peak
};

// Entries of both rows that lie next to each other, a whole number of pairs of vectors. Where one of them is left out, the
// pair with it lies elsewhere.
template <class T> struct Block {
  const T *s, *t;
  int n;
  int hole = -1;  // where the pair starts that lies at hole_s and hole_t
  const T *hole_s = nullptr, *hole_t = nullptr;

  const T* s_at(int i) const { return i == hole ? hole_s : s + i; }
  const T* t_at(int i) const { return i == hole ? hole_t : t + i; }
};

// Takes two rows through a fold, block by block. The fold has add<kGuarded, V>(block), and, where it keeps a peak,
// take_peak(peak) and passing, the logit of the new one. A block goes to it as it lies in memory; then, if need be,
// widened and with guards; then in double, which holds every difference of logits of the other types.
template <class V, class Fold> class Sweep {
 public:
  Sweep(const Row& s, const Row& t, Fold& fold) : s_(s), t_(t), fold_(fold) {}

  // Entries begin to end, but for the peak where it is one of them.
  void range(int64_t begin, int64_t end, int64_t peak = -1) {
    for (int64_t start = begin; start < end;) {
      const int64_t left = end - start;
      int n = static_cast<int>(left < kBlock ? left : kBlock);
      Added added = Added::kNotInThisType;
      if (n >= kStep) {
        added = directly<V>(s_, t_, added, [&](auto entry) {
          using T = decltype(entry);
          n -= n % kStep;  // the rest of the row is a block of its own, and widened
          return start <= peak && peak < start + n ? with_hole<T>(start, n, static_cast<int>(peak - start))
                                                   : fold_.template add<false, V>(block<T>(start, n));
        });
      }
      if (added == Added::kNotInThisType) added = widened(start, n, peak);
      if constexpr (Fold::kPeak) {
        if (added == Added::kNewPeak) with_new_peak(start, n);
      }
      start += n;
    }
  }

 private:
  static constexpr int kStep = 2 * kLanes<V>;

  template <class T> Block<T> block(int64_t start, int n) const {
    return {reinterpret_cast<const T*>(s_.data) + start, reinterpret_cast<const T*>(t_.data) + start, n};
  }

  // A block without guards, but for one entry: whose place takes logits so low that they have no mass, and yet finite.
  template <class T> Added with_hole(int64_t start, int n, int left_out) {
    constexpr float kNoMass = std::is_same_v<T, Half> ? -6.0e4f : -1.0e30f;
    if (!fold_.has_no_mass(kNoMass)) return Added::kNotInThisType;
    Block<T> all = block<T>(start, n);
    alignas(64) T hole_s[kStep], hole_t[kStep];
    all.hole = left_out - left_out % kStep;
    std::memcpy(hole_s, all.s + all.hole, sizeof hole_s);
    std::memcpy(hole_t, all.t + all.hole, sizeof hole_t);
    narrow(kNoMass, &hole_s[left_out % kStep]);
    narrow(kNoMass, &hole_t[left_out % kStep]);
    all.hole_s = hole_s;
    all.hole_t = hole_t;
    return fold_.template add<false, V>(all);
  }

  Added widened(int64_t start, int n, int64_t left_out) {
    const Added added = widened_to<V>(start, n, left_out);
    if constexpr (sizeof(Scalar<V>) == 4) {
      if (added == Added::kNotInThisType) return widened_to<Doubles>(start, n, left_out);
    }
    return added;
  }

  // Not inlined: its arrays would be on the stack of every call.
  template <class W> __attribute__((noinline)) Added widened_to(int64_t start, int n, int64_t left_out) {
    alignas(64) Scalar<W> wide_s[kBlock], wide_t[kBlock];
    widen_block<W>(s_, start, n, wide_s);
    const int padded = widen_block<W>(t_, start, n, wide_t);
    if (start <= left_out && left_out < start + n) wide_s[left_out - start] = wide_t[left_out - start] = -kInfinity;
    return fold_.template add<true, W>(Block<Scalar<W>>{wide_s, wide_t, padded});
  }

  void with_new_peak(int64_t start, int n) {
    const int64_t index = start + find(start, n, fold_.passing);
    fold_.take_peak(Peak{index, entry_of(s_, index), entry_of(t_, index)});
    range(start, start + n, index);
  }

  // The place of a block's largest student logit.
  int find(int64_t start, int n, double logit) const {
    int from = 0;
    directly<V>(s_, s_, 0, [&](auto entry) {
      using T = decltype(entry);
      const T* const p = reinterpret_cast<const T*>(s_.data) + start;
      const V wanted = broadcast<V>(static_cast<Scalar<V>>(logit));
      for (; from + kStep <= n; from += kStep) {
        const Pair<V> z = load_pair(p + from);
        if (any((z.first == wanted) | (z.second == wanted))) break;
      }
      return 0;
    });
    while (from < n - 1 && entry_of(s_, start + from) != logit) ++from;
    return from;
  }

  const Row &s_, &t_;
  Fold& fold_;
};

// Calls step(zs, zt) with every pair of vectors of a block, and flush() after every few of them.
template <class V, class T, class Step, class Flush>
ADAKD_INLINE void for_each_pair(const Block<T>& block, Step step, Flush flush) {
  constexpr int kStep = 2 * kLanes<V>, kChain = 16 * kStep;
  const Block<T> x = block;
  for (int begin = 0; begin < x.n; begin += kChain) {
    const int end = begin + kChain < x.n ? begin + kChain : x.n;
    for (int i = begin; i < end; i += kStep) step(load_pair(x.s_at(i)), load_pair(x.t_at(i)));
    flush();
  }
}

// Maxima of a block.
struct Maxima {
  double s, t;
};
template <class V, class T> inline Maxima block_maxima(const Block<T>& block) {
  V max_s = broadcast<V>(-kInfinity), max_t = max_s;
  for (int i = 0; i < block.n; i += 2 * kLanes<V>) {
    const Pair<V> a = load_pair(block.s_at(i)), b = load_pair(block.t_at(i));
    max_s = max(max(max_s, a.first), a.second);
    max_t = max(max(max_t, b.first), b.second);
  }
  return {max_lanes(max_s), max_lanes(max_t)};
}

}  // namespace ADAKD_ISA
}  // namespace adakd
