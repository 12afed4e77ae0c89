// One sweep over both rows of a token: block by block through a fold, the cheapest way first.
//
// A fold holds the running sums of a row. It has
//   add<kGuarded, V>(block), which adds a block and says what became of it (`Added`), and
//   has_no_mass(logit), whether that logit's mass is 0 in both rows;
// a fold with a peak (kPeak) has
//   new_peak, where it stopped in a block and for which logit, and
//   take_peak(peak), which makes that entry the peak.
#pragma once

#include <type_traits>

#include "peak.h"

namespace adakd {
namespace ADAKD_ISA {

// What became of a block.
enum class Added {
  kYes,
  kRetry,    // not added: a sum is not finite, or the block does not suit this type; the next way of folding may do
  kNewPeak,  // added up to an entry beyond which the block has a logit that has to become the peak first (`NewPeak`)
};

// Where a fold stopped within a block: `logit`, the largest of the student in the chain behind the first `added` entries,
// has to become the peak.
struct NewPeak {
  int added = 0;
  double logit = -kInfinity;
};

// Entries of a chain: 32 vectors, whose sums in fp32 are few and short enough to stay accurate (see Total).
template <class V> constexpr int kChain = 32 * kLanes<V>;

// n consecutive entries of both rows, a whole number of steps. To leave the peak out, the step that begins at entry
// `patch` is read from a copy instead.
template <class T> struct Block {
  const T *s, *t;
  int n;
  int patch = -1;
  const T *patch_s = nullptr, *patch_t = nullptr;

  // Its first entries, as many as one chain of sums has.
  template <class V> Block head() const {
    Block x = *this;
    if (x.n > kChain<V>) x.n = kChain<V>;
    return x;
  }

  const T* s_at(int i) const { return i == patch ? patch_s : s + i; }
  const T* t_at(int i) const { return i == patch ? patch_t : t + i; }
};

// Takes both rows of a token through a fold. Each block is folded in the first of three ways that works: without guards,
// from where it is stored or, where the rows are of unlike types, from copies in fp32; widened to scratch memory, with guards for
// entries at -inf; the same in double.
template <class V, class Fold> class Sweep {
 public:
  Sweep(const Row& s, const Row& t, Fold& fold) : s_(s), t_(t), fold_(fold) {}

  // Folds entries begin .. end, without the peak if that is one of them.
  void range(int64_t begin, int64_t end, int64_t peak = -1) {
    for (int64_t start = begin; start < end;) {
      const int64_t left = end - start;
      int n = static_cast<int>(left < kBlock ? left : kBlock);
      Added added = n < kStep<V> ? Added::kRetry : unguarded(start, n, peak);
      if (added == Added::kRetry) added = widened(start, n, peak);
      if constexpr (Fold::kPeak) {
        if (added == Added::kNewPeak) {
          const NewPeak& next = fold_.new_peak;
          start += next.added;
          peak = find(start, n - next.added, next.logit);
          fold_.take_peak(Peak{peak, entry_of(s_, peak), entry_of(t_, peak)});
          continue;
        }
      }
      start += n;
    }
  }

 private:
  static constexpr float kNoMassInFloat = -1.0e30f;

  // The first way. It shortens n to whole steps: what is left at the end of the row becomes a block of its own, too short
  // for this way.
  Added unguarded(int64_t start, int& n, int64_t peak) {
    if constexpr (kIsDouble<V>) return Added::kRetry;
    n -= n % kStep<V>;
    if (!readable_as_stored<V>(s_, t_)) return copied(start, n, peak);
    return as_stored<V>(s_, t_, Added::kRetry, [&](auto entry) {
      using T = decltype(entry);
      return start <= peak && peak < start + n ? without_peak<T>(start, n, static_cast<int>(peak - start))
                                               : fold_.template add<false, V>(block<T>(start, n));
    });
  }

  template <class T> Block<T> block(int64_t start, int n) const {
    return {reinterpret_cast<const T*>(s_.data) + start, reinterpret_cast<const T*>(t_.data) + start, n};
  }

  // The first way for a block with the peak. Its logits are replaced by ones that have no mass in these rows and are
  // finite all the same, because -inf would need guards.
  template <class T> Added without_peak(int64_t start, int n, int peak) {
    constexpr float kNoMass = std::is_same_v<T, Half> ? -6.0e4f : kNoMassInFloat;
    if (!fold_.has_no_mass(kNoMass)) return Added::kRetry;
    Block<T> all = block<T>(start, n);
    alignas(64) T patch_s[kStep<V>], patch_t[kStep<V>];
    all.patch = peak - peak % kStep<V>;
    std::memcpy(patch_s, all.s + all.patch, sizeof patch_s);
    std::memcpy(patch_t, all.t + all.patch, sizeof patch_t);
    narrow(kNoMass, &patch_s[peak % kStep<V>]);
    narrow(kNoMass, &patch_t[peak % kStep<V>]);
    all.patch_s = patch_s;
    all.patch_t = patch_t;
    return fold_.template add<false, V>(all);
  }

  // The first way for rows of unlike types. Not inlined, for the reason that widened_to gives.
  __attribute__((noinline)) Added copied(int64_t start, int n, int64_t peak) {
    alignas(64) Scalar<V> wide_s[kBlock], wide_t[kBlock];
    if (peak < start || start + n <= peak) {
      return fold_.template add<false, V>(
          Block<Scalar<V>>{as_scalars<V>(s_, start, n, wide_s), as_scalars<V>(t_, start, n, wide_t), n});
    }
    if (!fold_.has_no_mass(kNoMassInFloat)) return Added::kRetry;
    widen_block<V>(s_, start, n, wide_s);
    widen_block<V>(t_, start, n, wide_t);
    wide_s[peak - start] = wide_t[peak - start] = kNoMassInFloat;
    return fold_.template add<false, V>(Block<Scalar<V>>{wide_s, wide_t, n});
  }

  // The second way, and the third where the second is in fp32.
  Added widened(int64_t start, int n, int64_t peak) {
    const Added added = widened_to<V>(start, n, peak);
    if constexpr (!kIsDouble<V>) {
      if (added == Added::kRetry) return widened_to<Doubles>(start, n, peak);
    }
    return added;
  }

  // Not inlined, because its 64 kB of arrays would lie on the stack of every call of range().
  template <class W> __attribute__((noinline)) Added widened_to(int64_t start, int n, int64_t peak) {
    alignas(64) Scalar<W> wide_s[kBlock], wide_t[kBlock];
    widen_block<W>(s_, start, n, wide_s);
    const int padded = widen_block<W>(t_, start, n, wide_t);
    if (start <= peak && peak < start + n) wide_s[peak - start] = wide_t[peak - start] = -kInfinity;
    return fold_.template add<true, W>(Block<Scalar<W>>{wide_s, wide_t, padded});
  }

  // The first entry with this student logit, which one of the n entries from `start` on has: by vectors where they can
  // be loaded, then entry by entry.
  int64_t find(int64_t start, int n, double logit) const {
    int from = 0;
    as_stored<V>(s_, s_, 0, [&](auto entry) {
      using T = decltype(entry);
      const T* const p = reinterpret_cast<const T*>(s_.data) + start;
      const V wanted = broadcast<V>(static_cast<Scalar<V>>(logit));
      constexpr int kPair = 2 * kLanes<V>;
      for (; from + kPair <= n; from += kPair) {
        const Pair<V> z = load_pair(p + from);
        if (any((z.first == wanted) | (z.second == wanted))) break;
      }
      return 0;
    });
    while (from < n - 1 && entry_of(s_, start + from) != logit) ++from;
    return start + from;
  }

  const Row &s_, &t_;
  Fold& fold_;
};

// Calls add(s, t, i) with every step of a block, as `each` does, and flush() after every chain of them, which takes the chain's sums and
// returns true, or leaves them and returns false. Returns the number of entries whose sums were taken.
template <class V, class T, class Add, class Flush>
ADAKD_INLINE int for_each_step(const Block<T>& block, Add add, Flush flush) {
  const Block<T> x = block;  // a copy that the compiler can keep in registers
  for (int begin = 0; begin < x.n; begin += kChain<V>) {
    const int end = begin + kChain<V> < x.n ? begin + kChain<V> : x.n;
    for (int i = begin; i < end; i += kStep<V>) each(load_step<V>(x.s_at(i)), load_step<V>(x.t_at(i)), add);
    if (!flush()) return begin;
  }
  return x.n;
}

// The largest logit of a block in each row, but for NaN, which the sums show.
struct Maxima {
  double s, t;
};
template <class V, class T> inline Maxima block_maxima(const Block<T>& block) {
  V max_s = broadcast<V>(-kInfinity), max_t = max_s;
  for (int i = 0; i < block.n; i += kStep<V>) {
    max_s = max(load_step<V>(block.s_at(i)), max_s);
    max_t = max(load_step<V>(block.t_at(i)), max_t);
  }
  return {max_lanes(max_s), max_lanes(max_t)};
}

}  // namespace ADAKD_ISA
}  // namespace adakd
