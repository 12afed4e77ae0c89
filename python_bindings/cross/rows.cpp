// Takes rows of every type and kind through each kernel of the core and prints the results, or compares them with what
// another build of this program printed: `rows > expected`, then `other-rows expected`.
//
// The logits are multiples of 1/8 below 16, which every type holds and every processor computes alike. Results may
// differ by roundings: the builds have libraries of their own for the functions of doubles, and x86 alone flushes
// subnormal numbers.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../core/kernels.h"

namespace {

using adakd::Divergence;
using adakd::Type;

constexpr int64_t kTokens = 6, kStudentVocab = 1511, kTeacherVocab = 1500, kVocab = kTeacherVocab;
constexpr float kInfinity = __builtin_inff();

struct Named {
  Divergence divergence;
  const char* name;
  double alpha, beta;
};
#define NAMED(Class, name) {Divergence::k##Class, name, 0.2, 0.7},
const Named kDivergences[] = {ADAKD_DIVERGENCES(NAMED)};
#undef NAMED

int64_t width_of(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }

// The bits of a multiple of 1/8 below 16, or of an infinity.
void put(float x, Type type, char* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const double wide = x;
  uint16_t narrow = static_cast<uint16_t>(bits >> 16);
  if (type == Type::kHalf) {
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t half = magnitude == 0 ? 0 : std::isinf(x) ? 0x7c00 : (magnitude - 0x38000000u) >> 13;
    narrow = static_cast<uint16_t>((bits >> 16 & 0x8000) | half);
  }
  if (type == Type::kDouble) std::memcpy(to, &wide, 8);
  if (type == Type::kFloat) std::memcpy(to, &x, 4);
  if (type == Type::kBf16 || type == Type::kHalf) std::memcpy(to, &narrow, 2);
}

double get(Type type, const char* from) {
  if (type == Type::kDouble) {
    double x;
    std::memcpy(&x, from, 8);
    return x;
  }
  uint32_t bits = 0;
  if (type == Type::kFloat) {
    std::memcpy(&bits, from, 4);
  } else {
    uint16_t narrow;
    std::memcpy(&narrow, from, 2);
    if (type == Type::kHalf) {
      const int exponent = narrow >> 10 & 0x1f, fraction = narrow & 0x3ff;
      const double magnitude = exponent == 31 ? (fraction ? __builtin_nan("") : kInfinity)
                               : exponent == 0 ? std::ldexp(fraction, -24)
                                               : std::ldexp(fraction + 1024, exponent - 25);
      return narrow & 0x8000 ? -magnitude : magnitude;
    }
    bits = static_cast<uint32_t>(narrow) << 16;
  }
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Rows of one side: ordinary ones, one with entries at -inf, a confident one, one that rises late, one of nothing but
// -inf, and for the teacher a copy of the student's.
std::vector<char> rows_of(Type type, int64_t vocab, uint64_t seed, bool teacher) {
  std::vector<char> rows(kTokens * vocab * width_of(type));
  for (int64_t n = 0; n < kTokens; ++n) {
    uint64_t state = seed + (n == 5 ? 100 : n + (teacher ? 50 : 0));
    for (int64_t i = 0; i < vocab; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      float x = static_cast<float>(static_cast<int>(state >> 58) - 32) / 8.0f;
      if (n == 1 && (teacher ? i % 11 == 3 : i % 7 == 0)) x = -kInfinity;
      if (n == 2 && i == 700) x = 15.0f;
      if (n == 3 && i > 1000) x += 8.0f;
      if (n == 4 && teacher) x = -kInfinity;
      put(x, type, rows.data() + (n * vocab + i) * width_of(type));
    }
  }
  return rows;
}

class Report {
 public:
  explicit Report(FILE* expected) : expected_(expected) {}

  // Numbers of one kind, all of one unit: an error counts against the largest of them.
  void add(const std::string& what, const std::vector<double>& numbers, double unit) {
    std::vector<double> wanted(numbers.size());
    double largest = 0.0;
    for (size_t i = 0; i < numbers.size(); ++i) {
      if (expected_ == nullptr) std::printf("%s %.17g\n", what.c_str(), numbers[i]);
      if (expected_ != nullptr && !read(what, wanted[i])) return;
      if (std::isfinite(wanted[i])) largest = std::fmax(largest, std::fabs(wanted[i]));
    }
    if (expected_ == nullptr) return;
    for (size_t i = 0; i < numbers.size(); ++i) {
      const bool same = numbers[i] == wanted[i] || (std::isnan(numbers[i]) && std::isnan(wanted[i]));
      ++compared_;
      if (same || std::fabs(numbers[i] - wanted[i]) <= unit * largest) continue;
      if (++wrong_ <= 20) std::printf("%s, number %zu: %.9g, expected %.9g\n", what.c_str(), i, numbers[i], wanted[i]);
    }
  }

  // Whether everything agrees, and nothing expected is left.
  bool good() {
    char rest[2];
    if (expected_ == nullptr) return true;
    if (std::fscanf(expected_, "%1s", rest) == 1) ++wrong_;
    std::printf("%lld numbers compared, %lld wrong\n", compared_, wrong_);
    return wrong_ == 0 && compared_ > 0;
  }

 private:
  bool read(const std::string& what, double& number) {
    char name[128], text[64];
    if (std::fscanf(expected_, "%127s %63s", name, text) == 2 && what == name) {
      number = std::strtod(text, nullptr);
      return true;
    }
    if (++wrong_ <= 20) std::printf("%s is not what was expected here\n", what.c_str());
    return false;
  }

  FILE* expected_;
  long long compared_ = 0, wrong_ = 0;
};

// Per-token results in the accumulation type, `count` of each.
struct Numbers {
  explicit Numbers(bool in_double, int64_t count = kTokens) : in_double(in_double), data(count * 8), count(count) {}
  bool in_double;
  std::vector<char> data;
  int64_t count;

  void* at() { return data.data(); }
  void set(int64_t n, double x) {
    const float narrow = static_cast<float>(x);
    in_double ? std::memcpy(&data[n * 8], &x, 8) : std::memcpy(&data[n * 4], &narrow, 4);
  }
  std::vector<double> values() const {
    std::vector<double> x;
    for (int64_t n = 0; n < count; ++n) {
      x.push_back(get(in_double ? Type::kDouble : Type::kFloat, &data[n * (in_double ? 8 : 4)]));
    }
    return x;
  }
};

void run(Type student_type, Type teacher_type, const std::string& types, Report& report) {
  const adakd::Kernels& kernels = *adakd::kernels();
  const bool in_double = student_type == Type::kDouble || teacher_type == Type::kDouble;
  std::vector<char> s = rows_of(student_type, kStudentVocab, 1, false);
  std::vector<char> t = rows_of(teacher_type, kTeacherVocab, 1, true);
  const adakd::Rows rows{{s.data(), student_type, 0, kStudentVocab}, {t.data(), teacher_type, 0, kTeacherVocab},
                         kTokens, kVocab};
  const auto fresh = [in_double] { return Numbers(in_double); };
  Numbers tau = fresh(), weight = fresh(), ce_weight = fresh();
  bool mask[kTokens];
  int64_t labels[kTokens], peak[kTokens];
  for (int64_t n = 0; n < kTokens; ++n) {
    tau.set(n, 0.75 + 0.25 * n);
    weight.set(n, 0.5);
    ce_weight.set(n, n % 2 == 0 ? 0.25 : 0.0);
    mask[n] = true;
    labels[n] = 100 * n;
  }
  // Double differs in the functions of the library only, by a few of its units.
  const double unit = in_double ? 1e-13 : 1e-6;
  const double of_gradient = student_type == Type::kBf16 ? 8e-3 : student_type == Type::kHalf ? 1e-3 : unit;

  Numbers distance = fresh(), one_max_s = fresh(), one_sum_s = fresh(), one_max_t = fresh(), one_sum_t = fresh();
  const adakd::StatsCall stats{rows, mask, distance.at(),
                               {one_max_s.at(), one_sum_s.at(), one_max_t.at(), one_sum_t.at()}};
  for (int64_t n = 0; n < kTokens; ++n) kernels.token_stats(stats, n);
  report.add(types + "/distance", distance.values(), unit);
  report.add(types + "/sum", one_sum_s.values(), unit);

  for (const Named& which : kDivergences) {
    const std::string name = types + "/" + which.name;
    Numbers d = fresh(), sum_g = fresh(), peak_grad = fresh();
    Numbers max_s = fresh(), sum_s = fresh(), max_t = fresh(), sum_t = fresh();
    const adakd::Normalizers at_tau{max_s.at(), sum_s.at(), max_t.at(), sum_t.at()};
    std::vector<char> grad(s.size());
    const adakd::WithGradientCall call{
        {rows, which.divergence, which.alpha, which.beta, tau.at(), mask, d.at(), sum_g.at(), peak, peak_grad.at(),
         at_tau},
        {rows, which.divergence, which.alpha, which.beta, {grad.data(), student_type, 0, kStudentVocab},
         kStudentVocab, tau.at(), weight.at(), sum_g.at(), at_tau, peak, peak_grad.at(), labels, ce_weight.at(),
         one_max_s.at(), one_sum_s.at()}};
    std::vector<float> scratch(kVocab);
    for (int64_t n = 0; n < kTokens; ++n) kernels.token_divergence_with_gradient(call, n, scratch.data());
    report.add(name + "/d", d.values(), unit);
    report.add(name + "/sum_g", sum_g.values(), unit);
    report.add(name + "/peak", std::vector<double>(peak, peak + kTokens), 0.0);
    report.add(name + "/peak_grad", peak_grad.values(), unit);
    for (int64_t n = 0; n < kTokens; ++n) {
      std::vector<double> row;
      for (int64_t i = 0; i < kStudentVocab; ++i) {
        row.push_back(get(student_type, grad.data() + (n * kStudentVocab + i) * width_of(student_type)));
      }
      report.add(name + "/gradient", row, of_gradient);
    }
    if (!kernels.takes_two_sweeps(which.divergence)) continue;
    Numbers c = fresh(), f = fresh(), g = fresh();
    const adakd::TermsCall terms{rows, which.divergence, which.alpha, which.beta, tau.at(), mask, at_tau, c.at(),
                                 peak, f.at(), g.at()};
    for (int64_t n = 0; n < kTokens; ++n) kernels.token_terms(terms, n);
    report.add(name + "/terms_f", f.values(), unit);
    report.add(name + "/terms_g", g.values(), unit);
  }

  Numbers forward = fresh(), kept = fresh(), reverse = fresh(), lost = fresh(), forward_grad = fresh();
  Numbers reverse_grad = fresh(), max_s = fresh(), sum_s = fresh(), max_t = fresh(), sum_t = fresh();
  const adakd::KlCall kl{rows, tau.at(), mask, forward.at(), kept.at(), reverse.at(), lost.at(), peak,
                         forward_grad.at(), reverse_grad.at(), {max_s.at(), sum_s.at(), max_t.at(), sum_t.at()}};
  for (int64_t n = 0; n < kTokens; ++n) kernels.token_kl(kl, n);
  report.add(types + "/kl/forward", forward.values(), unit);
  report.add(types + "/kl/kept", kept.values(), unit);
  report.add(types + "/kl/lost", lost.values(), unit);
}

}  // namespace

int main(int count, char** arguments) {
  FILE* const expected = count > 1 ? std::fopen(arguments[1], "r") : nullptr;
  if (count > 1 && expected == nullptr) {
    std::printf("cannot read %s\n", arguments[1]);
    return 2;
  }
  if (adakd::kernels() == nullptr) {
    std::printf("ADAKD_ISA names an instruction set that this build lacks: unset it, or set it to portable\n");
    return 2;
  }
  Report report(expected);
  run(Type::kFloat, Type::kFloat, "fp32", report);
  run(Type::kBf16, Type::kBf16, "bf16", report);
  run(Type::kHalf, Type::kHalf, "fp16", report);
  run(Type::kDouble, Type::kDouble, "fp64", report);
  run(Type::kBf16, Type::kFloat, "bf16-fp32", report);
  run(Type::kFloat, Type::kHalf, "fp32-fp16", report);
  return report.good() ? 0 : 1;
}
