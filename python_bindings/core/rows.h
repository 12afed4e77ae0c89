// What the kernels share: where a row lies, reading a piece of it in another type, and the running normaliser of a row.
#pragma once

#include "exp_log.h"
#include "kernels.h"

namespace adakd {
namespace ADAKD_ISA {

// A row is taken a block at a time: both sides of a block stay in the nearest caches if it has to be read again.
constexpr int kBlock = 4096;
constexpr float kInfinity = __builtin_inff();
constexpr double kLn2 = 0.69314718055994530942;
constexpr double kLog2e = 1.44269504088896340736;
// Where an entry may be -inf, differences of logits are kept above this, so that their products with 0 stay finite.
constexpr float kLowest = -1.0e30f;

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

// Powers of two in a unit of logits at temperature τ, as the kernel's type has it.
template <class V> inline double scale_of(double tau) { return static_cast<Scalar<V>>(kLog2e / tau); }

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

// Takes two rows through a fold, block by block. The fold has add<kGuarded, V>(s, t, n), which adds n entries and is
// false, having added none, if they need guards.
template <class V, class Fold> inline void sweep(const Row& s, const Row& t, int64_t vocab, Fold& fold) {
  alignas(64) Scalar<V> wide_s[kBlock], wide_t[kBlock];
  constexpr int kStep = 2 * kLanes<V>;
  for (int64_t start = 0; start < vocab;) {
    const int64_t left = vocab - start;
    int n = static_cast<int>(left < kBlock ? left : kBlock);
    bool added = false;
    if (n >= kStep) {
      added = directly<V>(s, t, false, [&](auto entry) {
        using T = decltype(entry);
        n -= n % kStep;  // the rest of the row is a block of its own, and widened
        return fold.template add<false, V>(reinterpret_cast<const T*>(s.data) + start,
                                           reinterpret_cast<const T*>(t.data) + start, n);
      });
    }
    if (!added) {
      widen_block<V>(s, start, n, wide_s);
      const int padded = widen_block<V>(t, start, n, wide_t);
      fold.template add<true, V>(wide_s, wide_t, padded);
    }
    start += n;
  }
}

// Calls step(offset) for every pair of vectors of a block of n entries, and flush() after every few of them.
template <class V, class Step, class Flush> ADAKD_INLINE void for_each_pair(int n, Step step, Flush flush) {
  constexpr int kStep = 2 * kLanes<V>, kChain = 16 * kStep;
  for (int begin = 0; begin < n; begin += kChain) {
    const int end = begin + kChain < n ? begin + kChain : n;
    for (int i = begin; i < end; i += kStep) step(i);
    flush();
  }
}

// Maxima of a block.
struct Maxima {
  double s, t;
};
template <class V, class T> inline Maxima block_maxima(const T* s, const T* t, int n) {
  V max_s = broadcast<V>(-kInfinity), max_t = max_s;
  for (int i = 0; i < n; i += 2 * kLanes<V>) {
    const Pair<V> a = load_pair(s + i), b = load_pair(t + i);
    max_s = max(max(max_s, a.first), a.second);
    max_t = max(max(max_t, b.first), b.second);
  }
  return {max_lanes(max_s), max_lanes(max_t)};
}

}  // namespace ADAKD_ISA
}  // namespace adakd
