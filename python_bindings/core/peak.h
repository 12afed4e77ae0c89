// The student's most likely entry of a row, its peak, and the result of a row, in which the peak has a gradient of its
// own (docs/maths.md, section 4).
//
// A confident row has nearly all its mass on one entry, and the gradient there depends on sums over the other entries:
// 1 - q of 1e-9 is lost beside q. So the folds keep the peak out of their sums.
#pragma once

#include "rows.h"

namespace adakd {
namespace ADAKD_ISA {

// The student's most likely entry so far, or one with at least an eighth of that one's mass.
struct Peak {
  int64_t index = -1;
  double s = -kInfinity, t = -kInfinity;  // its logits

  bool exists() const { return index >= 0; }
  // Whether the teacher has a mass there too. Else the peak is no entry of D, only of the student's normaliser.
  bool finite() const { return exists() && t != -kInfinity; }

  // An entry with a larger student logit has to become the peak. One that lies at most 3 powers of two higher does not:
  // beside this peak it has at most 8/9 of the mass, and nothing cancels. S: the type that the logits are compared in. The
  // limit is never below the peak, so that an entry equal to it, +inf too, does not ask for a new peak without end.
  template <class S> S limit(double scale) const {
    return exists() ? static_cast<S>(max(s, static_cast<double>(saturated<S>(s + 3.0 / scale)))) : -kInfinity;
  }
};

// What a row gives besides its normalisers.
struct RowResult {
  double d = 0.0, sum_g = 0.0;
  int64_t peak = -1;       // the entry whose gradient is peak_grad instead of (10)'s, or -1
  double peak_grad = 0.0;  // τ·∂D/∂zˢ there

  // With c = -g/q of the peak, g + c·q is 0 there. So the peak's gradient g - q·Σg is -q·rest with rest = Σ (g + c·q)
  // over the other entries, and Σg = rest - c because Σq = 1.
  void set_gradient(int64_t index, double q, double c, double rest) {
    sum_g = rest - c;
    peak = index;
    peak_grad = -q * rest;
  }
};

}  // namespace ADAKD_ISA
}  // namespace adakd
