// Registers the core as the CPU kernels of the `adakd::` operators, through torch's stable ABI: one binary serves torch
// 2.10 and later. Schemas, shapes and meanings stand in adakd_kernels/ops; here tensors become pointers, and tokens are
// spread over torch's threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/kernels.h"
#include "core/tokens.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

const adakd::Kernels& kernels() {
  const adakd::Kernels* const chosen = adakd::kernels();
  if (chosen == nullptr) throw std::runtime_error("ADAKD_ISA names an instruction set that this processor lacks");
  return *chosen;
}

adakd::Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return adakd::Type::kFloat;
    case ScalarType::BFloat16: return adakd::Type::kBf16;
    case ScalarType::Half: return adakd::Type::kHalf;
    case ScalarType::Double: return adakd::Type::kDouble;
    default: throw std::runtime_error("logits must be fp16, bf16, fp32 or fp64");
  }
}

adakd::Logits logits_of(const Tensor& x) { return {x.data_ptr(), type_of(x), x.stride(0), x.stride(1)}; }

adakd::Rows rows_of(const Tensor& student, const Tensor& teacher) {
  const int64_t vocab = student.size(2) < teacher.size(2) ? student.size(2) : teacher.size(2);
  return {logits_of(student), logits_of(teacher), student.size(1), vocab};
}

// Per-token numbers as the core takes them: contiguous, in the accumulation type.
ScalarType accumulation_type(const Tensor& student, const Tensor& teacher) {
  const bool any = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  return any ? ScalarType::Double : ScalarType::Float;
}
Tensor numbers(const Tensor& x, ScalarType type) {
  const Tensor converted = x.scalar_type() == type ? x : torch::stable::to(x, type);
  return torch::stable::contiguous(converted);
}
std::optional<Tensor> numbers(const std::optional<Tensor>& x, ScalarType type) {
  return x.has_value() ? std::optional<Tensor>(numbers(*x, type)) : std::nullopt;
}
const void* data_of(const std::optional<Tensor>& x) { return x.has_value() ? x->data_ptr() : nullptr; }

// A (4, B, L) bundle holds max_s, sum_s, max_t and sum_t one after the other, `numbers` of it contiguously.
Tensor new_bundle(const Tensor& student, const Tensor& mask, ScalarType type) {
  return torch::stable::new_empty(student, {4, mask.size(0), mask.size(1)}, type);
}
adakd::Normalizers normalizers_of(const Tensor& bundle) {
  char* const first = static_cast<char*>(bundle.data_ptr());
  const int64_t bytes = bundle.numel() / 4 * bundle.element_size();
  return {first, first + bytes, first + 2 * bytes, first + 3 * bytes};
}

adakd::Divergence divergence_of(const std::string& wanted) {
#define ADAKD_IF_WANTED(Class, name) \
  if (wanted == name) return adakd::Divergence::k##Class;
  ADAKD_DIVERGENCES(ADAKD_IF_WANTED)
#undef ADAKD_IF_WANTED
  throw std::runtime_error("the C++ kernels for the CPU have no divergence '" + wanted +
                           "': build them anew (python setup.py build_ext --inplace); if they still lack it, it is " +
                           "missing in python_bindings/core/divergences.h");
}

// How many threads take the tokens of a call.
int64_t threads_for(const adakd::Rows& rows, int64_t tokens) {
  constexpr int64_t kEntriesWorthAThread = 1 << 15;
  const int64_t useful = 1 + tokens * rows.vocab / kEntriesWorthAThread;
  const int64_t threads = torch::stable::get_num_threads();
  return threads < useful ? threads : useful;
}

// Calls run(n, thread) for every token n. Threads take the next token as they finish one: tokens that are not selected
// take no time, and where they lie is up to the data.
template <class Run> void for_each_token(int64_t threads, int64_t tokens, Run run) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t thread, int64_t) {
    for (int64_t n = next++; n < tokens; n = next++) run(n, thread);
  };
  if (threads < 2) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, work);
  }
}
template <class Call>
void for_each_token(void (*kernel)(const Call&, int64_t), const Call& call, const adakd::Rows& rows, int64_t tokens) {
  for_each_token(threads_for(rows, tokens), tokens, [&](int64_t n, int64_t) { kernel(call, n); });
}

Two token_stats(const Tensor& student, const Tensor& teacher, const Tensor& mask) {
  const ScalarType type = accumulation_type(student, teacher);
  Tensor difficulty = torch::stable::new_empty(student, mask.sizes(), type);
  Tensor normalizers_1 = new_bundle(student, mask, type);
  const Tensor valid = torch::stable::contiguous(mask);
  const adakd::StatsCall call{rows_of(student, teacher), static_cast<const bool*>(valid.data_ptr()),
                              difficulty.data_ptr(), normalizers_of(normalizers_1)};
  for_each_token(kernels().token_stats, call, call.rows, mask.numel());
  return {difficulty, normalizers_1};
}

// A call of `adakd::token_divergence` with the tensors that it points to: its results, and the numbers that it reads.
struct Divergences {
  ScalarType type;
  Tensor tau, selected;
  Tensor d, sum_g, normalizers_tau, peak, peak_grad;
  adakd::DivergenceCall call;

  Divergences(const Tensor& student, const Tensor& teacher, const Tensor& temperature, const Tensor& mask,
              const std::string& divergence, double alpha, double beta)
      : type(accumulation_type(student, teacher)), tau(numbers(temperature, type)),
        selected(torch::stable::contiguous(mask)), d(fresh(student, mask, type)), sum_g(fresh(student, mask, type)),
        normalizers_tau(new_bundle(student, mask, type)), peak(fresh(student, mask, ScalarType::Long)),
        peak_grad(fresh(student, mask, type)),
        call{rows_of(student, teacher),
             divergence_of(divergence),
             alpha,
             beta,
             tau.data_ptr(),
             static_cast<const bool*>(selected.data_ptr()),
             d.data_ptr(),
             sum_g.data_ptr(),
             static_cast<int64_t*>(peak.data_ptr()),
             peak_grad.data_ptr(),
             normalizers_of(normalizers_tau)} {}

  Five results() const { return {d, sum_g, normalizers_tau, peak, peak_grad}; }

 private:
  static Tensor fresh(const Tensor& student, const Tensor& mask, ScalarType type) {
    return torch::stable::new_empty(student, mask.sizes(), type);
  }
};

Five token_divergence(const Tensor& student, const Tensor& teacher, const Tensor& temperature, const Tensor& mask,
                      const std::string& divergence, double alpha, double beta) {
  const Divergences x(student, teacher, temperature, mask, divergence, alpha, beta);
  for_each_token(kernels().token_divergence, x.call, x.call.rows, mask.numel());
  return x.results();
}

Eight token_kl(const Tensor& student, const Tensor& teacher, const Tensor& temperature, const Tensor& mask) {
  const ScalarType type = accumulation_type(student, teacher);
  const auto fresh = [&] { return torch::stable::new_empty(student, mask.sizes(), type); };
  Tensor forward = fresh(), kept = fresh(), reverse = fresh(), lost = fresh();
  Tensor normalizers_tau = new_bundle(student, mask, type), forward_grad = fresh(), reverse_grad = fresh();
  Tensor peak = torch::stable::new_empty(student, mask.sizes(), ScalarType::Long);
  const Tensor tau = numbers(temperature, type), selected = torch::stable::contiguous(mask);
  const adakd::KlCall call{rows_of(student, teacher),
                           tau.data_ptr(),
                           static_cast<const bool*>(selected.data_ptr()),
                           forward.data_ptr(),
                           kept.data_ptr(),
                           reverse.data_ptr(),
                           lost.data_ptr(),
                           static_cast<int64_t*>(peak.data_ptr()),
                           forward_grad.data_ptr(),
                           reverse_grad.data_ptr(),
                           normalizers_of(normalizers_tau)};
  for_each_token(kernels().token_kl, call, call.rows, mask.numel());
  return {forward, kept, reverse, lost, normalizers_tau, peak, forward_grad, reverse_grad};
}

Two token_terms(const Tensor& student, const Tensor& teacher, const Tensor& temperature, const Tensor& mask,
                const Tensor& normalizers_tau, const Tensor& constant, const Tensor& peak,
                const std::string& divergence, double alpha, double beta) {
  const adakd::Divergence which = divergence_of(divergence);
  if (!kernels().takes_two_sweeps(which)) {
    throw std::runtime_error("adakd::token_terms takes divergences of two sweeps, and '" + divergence + "' takes one");
  }
  const ScalarType type = accumulation_type(student, teacher);
  const auto fresh = [&] { return torch::stable::new_empty(student, mask.sizes(), type); };
  Tensor f = fresh(), g = fresh();
  // The converted tensors live until the last token is done: the call holds pointers only.
  const Tensor tau = numbers(temperature, type), selected = torch::stable::contiguous(mask);
  const Tensor of_tau = numbers(normalizers_tau, type), c = numbers(constant, type);
  const Tensor left_out = numbers(peak, ScalarType::Long);
  const adakd::TermsCall call{rows_of(student, teacher),
                              which,
                              alpha,
                              beta,
                              tau.data_ptr(),
                              static_cast<const bool*>(selected.data_ptr()),
                              normalizers_of(of_tau),
                              c.data_ptr(),
                              static_cast<const int64_t*>(left_out.data_ptr()),
                              f.data_ptr(),
                              g.data_ptr()};
  for_each_token(kernels().token_terms, call, call.rows, mask.numel());
  return {f, g};
}

// Asks for large pages under memory that is about to be written for the first time: clearing it page by page as it is
// touched takes the system about as long as computing what goes into it. Each page is touched here by one thread: two
// that meet at one would both clear it.
void touch_in_large_pages(const Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(x.data_ptr()) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(x.data_ptr()) + x.numel() * x.element_size()) / kPage * kPage;
  if (begin >= end || madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) != 0) return;
  torch::stable::parallel_for(0, static_cast<int64_t>((end - begin) / kPage), 1, [begin](int64_t first, int64_t last) {
    for (int64_t page = first; page < last; ++page) *reinterpret_cast<volatile char*>(begin + page * kPage) = 0;
  });
#endif
}

// A call of `adakd::token_divergence_backward` with the tensors that it points to. The arguments are those of
// `GradientCall` in adakd_kernels/reference.py, and `out` takes the gradient.
struct Gradients {
  ScalarType type;
  Tensor tau, w, g, of_tau, top, top_grad;
  std::optional<Tensor> ids, ce_w, of_1;
  adakd::GradientCall call;

  Gradients(const Tensor& out, const Tensor& student, const Tensor& teacher, const Tensor& temperature,
            const Tensor& weight, const Tensor& sum_g, const Tensor& normalizers_tau, const Tensor& peak,
            const Tensor& peak_grad, const std::optional<Tensor>& labels, const std::optional<Tensor>& ce_weight,
            const std::optional<Tensor>& normalizers_1, const std::string& divergence, double alpha, double beta)
      : type(accumulation_type(student, teacher)), tau(numbers(temperature, type)), w(numbers(weight, type)),
        g(numbers(sum_g, type)), of_tau(numbers(normalizers_tau, type)), top(numbers(peak, ScalarType::Long)),
        top_grad(numbers(peak_grad, type)), ids(numbers(labels, ScalarType::Long)), ce_w(numbers(ce_weight, type)),
        of_1(numbers(normalizers_1, type)) {
    const adakd::Normalizers ce = of_1.has_value() ? normalizers_of(*of_1) : adakd::Normalizers{};
    call = {rows_of(student, teacher),
            divergence_of(divergence),
            alpha,
            beta,
            logits_of(out),
            student.size(2),
            tau.data_ptr(),
            w.data_ptr(),
            g.data_ptr(),
            normalizers_of(of_tau),
            static_cast<const int64_t*>(top.data_ptr()),
            top_grad.data_ptr(),
            static_cast<const int64_t*>(data_of(ids)),
            data_of(ce_w),
            ce.max_s,
            ce.sum_s};
  }
};

// Where the gradient goes: over the student's logits, or to memory of its own.
template <bool kInPlace> Tensor gradient_of(const Tensor& student) {
  if constexpr (kInPlace) return student;
  const Tensor out = torch::stable::new_empty(student, student.sizes());
  touch_in_large_pages(out);
  return out;
}

template <bool kInPlace>
std::conditional_t<kInPlace, void, Tensor> token_divergence_backward(
    Tensor student, const Tensor& teacher, const Tensor& temperature, const Tensor& weight, const Tensor& sum_g,
    const Tensor& normalizers_tau, const Tensor& peak, const Tensor& peak_grad, const std::optional<Tensor>& labels,
    const std::optional<Tensor>& ce_weight, const std::optional<Tensor>& normalizers_1, const std::string& divergence,
    double alpha, double beta) {
  const Tensor out = gradient_of<kInPlace>(student);
  const Gradients x(out, student, teacher, temperature, weight, sum_g, normalizers_tau, peak, peak_grad, labels,
                    ce_weight, normalizers_1, divergence, alpha, beta);
  for_each_token(kernels().token_divergence_backward, x.call, x.call.rows, weight.numel());
  if constexpr (!kInPlace) return out;
}

// `adakd::token_divergence_with_gradient`, which returns the gradient last, and its twin in place. The results of a
// token's divergence are those of the two operators, because the same two functions compute them, one after the other
// while the row is in the cache.
template <bool kInPlace>
std::conditional_t<kInPlace, Five, Six> token_divergence_with_gradient(
    Tensor student, const Tensor& teacher, const Tensor& temperature, const Tensor& mask,
    const std::string& divergence, double alpha, double beta, const Tensor& weight,
    const std::optional<Tensor>& labels, const std::optional<Tensor>& ce_weight,
    const std::optional<Tensor>& normalizers_1) {
  const Tensor out = gradient_of<kInPlace>(student);
  const Divergences x(student, teacher, temperature, mask, divergence, alpha, beta);
  const Gradients y(out, student, teacher, temperature, weight, x.sum_g, x.normalizers_tau, x.peak, x.peak_grad,
                    labels, ce_weight, normalizers_1, divergence, alpha, beta);
  const adakd::WithGradientCall call{x.call, y.call};
  const adakd::Rows& rows = x.call.rows;
  const int64_t threads = threads_for(rows, mask.numel());
  // A row of floats for each thread, in whole lines.
  const int64_t width = kernels().takes_two_sweeps(x.call.divergence) ? (rows.vocab + 15) / 16 * 16 : 0;
  const Tensor scratch = torch::stable::new_empty(student, {threads, width}, ScalarType::Float);
  float* const first = width == 0 ? nullptr : static_cast<float*>(scratch.data_ptr());
  for_each_token(threads, mask.numel(), [&](int64_t n, int64_t thread) {
    kernels().token_divergence_with_gradient(call, n, first == nullptr ? nullptr : first + thread * width);
  });
  if constexpr (kInPlace) {
    return x.results();
  } else {
    return std::tuple_cat(x.results(), std::make_tuple(out));
  }
}

// The value of a 0-d tensor of any real type.
double value_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return *static_cast<const double*>(x.data_ptr());
    case ScalarType::Float: return *static_cast<const float*>(x.data_ptr());
    case ScalarType::Long: return static_cast<double>(*static_cast<const int64_t*>(x.data_ptr()));
    default: return *static_cast<const double*>(numbers(x, ScalarType::Double).data_ptr());
  }
}
double value_of(const std::optional<Tensor>& x, double otherwise) { return x.has_value() ? value_of(*x) : otherwise; }

bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }
const bool* mask_of(const Tensor& x) { return static_cast<const bool*>(x.data_ptr()); }

Four choose_tokens(const Tensor& difficulty, const Tensor& valid, const std::optional<Tensor>& share,
                   double focus_ratio, const std::optional<Tensor>& items, std::optional<double> num_items,
                   double temperature_scale, double base_temperature) {
  Tensor selected = torch::stable::new_empty(valid, valid.sizes());
  Tensor temperature = torch::stable::new_empty(difficulty, difficulty.sizes());
  Tensor n = torch::stable::new_empty(difficulty, {}), k = torch::stable::new_empty(difficulty, {});
  const Tensor s2 = torch::stable::contiguous(difficulty), mask = torch::stable::contiguous(valid);
  adakd::choose_tokens({is_double(difficulty), valid.numel(), s2.data_ptr(), mask_of(mask),
                        value_of(share, focus_ratio), items.has_value() || num_items.has_value(),
                        value_of(items, num_items.value_or(0.0)), temperature_scale, base_temperature,
                        static_cast<bool*>(selected.data_ptr()), temperature.data_ptr(), n.data_ptr(), k.data_ptr()});
  return {selected, temperature, n, k};
}

void focus_step_(const Tensor& loss, Tensor focus_ratio, Tensor loss_ema, Tensor loss_reference, Tensor steps,
                 int64_t warmup_steps, double beta, double epsilon, double delta, double min_ratio) {
  const auto state = [](const Tensor& x) { return static_cast<double*>(x.data_ptr()); };
  adakd::focus_step(value_of(loss),
                    {state(focus_ratio), state(loss_ema), state(loss_reference),
                     static_cast<int64_t*>(steps.data_ptr())},
                    warmup_steps, beta, epsilon, delta, min_ratio);
}

Tensor token_cross_entropy(const Tensor& student, const Tensor& teacher, const Tensor& labels, const Tensor& mask,
                           const Tensor& normalizers_1) {
  Tensor out = torch::stable::new_empty(normalizers_1, mask.sizes());
  const Tensor ids = numbers(labels, ScalarType::Long), valid = torch::stable::contiguous(mask);
  const Tensor of_1 = torch::stable::contiguous(normalizers_1);
  const adakd::Normalizers of = normalizers_of(of_1);
  adakd::token_cross_entropy({is_double(of_1), rows_of(student, teacher), mask.numel(),
                              static_cast<const int64_t*>(ids.data_ptr()), mask_of(valid), of.max_s, of.sum_s,
                              out.data_ptr()});
  return out;
}

Four spread_statistics(const Tensor& difficulty, const Tensor& normalizers_1, const Tensor& positions, int64_t batch,
                       const std::optional<Tensor>& label_logits, const std::optional<Tensor>& labels,
                       int64_t vocab) {
  const ScalarType type = difficulty.scalar_type();
  const int64_t count = difficulty.numel();
  Tensor everywhere = torch::stable::new_empty(difficulty, {1, batch});
  Tensor valid = torch::stable::new_empty(difficulty, {1, batch}, ScalarType::Bool);
  Tensor valid_here = torch::stable::new_empty(difficulty, {1, count}, ScalarType::Bool);
  Tensor cross_entropy = torch::stable::new_empty(difficulty, {1, labels.has_value() ? count : 0});
  const Tensor distance = numbers(difficulty, type), of_1 = numbers(normalizers_1, type);
  const Tensor places = numbers(positions, ScalarType::Long);
  const auto logits = numbers(label_logits, type), ids = numbers(labels, ScalarType::Long);
  const adakd::Normalizers of = normalizers_of(of_1);
  adakd::spread_statistics({is_double(difficulty), count, batch, distance.data_ptr(), of.max_s, of.sum_s, of.sum_t,
                            static_cast<const int64_t*>(places.data_ptr()), data_of(logits),
                            static_cast<const int64_t*>(data_of(ids)), vocab, everywhere.data_ptr(),
                            static_cast<bool*>(valid.data_ptr()), static_cast<bool*>(valid_here.data_ptr()),
                            cross_entropy.data_ptr()});
  return {everywhere, valid, valid_here, cross_entropy};
}

Three loss_sums(const Tensor& d, const Tensor& temperature, const Tensor& k,
                const std::optional<Tensor>& cross_entropy, const std::optional<Tensor>& n, double ce_weight,
                const std::optional<Tensor>& positions, int64_t batch) {
  const ScalarType type = d.scalar_type();
  Tensor token_loss = positions.has_value() ? torch::stable::new_empty(d, {1, batch})
                                            : torch::stable::new_empty(d, d.sizes());
  Tensor loss = torch::stable::new_empty(d, {});
  Tensor distillation = torch::stable::new_empty(d, {}, ScalarType::Double);
  const Tensor of_d = numbers(d, type), tau = numbers(temperature, type);
  const auto ce = numbers(cross_entropy, type), places = numbers(positions, ScalarType::Long);
  adakd::loss_sums({is_double(d), d.numel(), static_cast<const int64_t*>(data_of(places)), batch, of_d.data_ptr(), tau.data_ptr(), data_of(ce), value_of(n, 1.0),
                    value_of(k), ce_weight, token_loss.data_ptr(), loss.data_ptr(),
                    static_cast<double*>(distillation.data_ptr())});
  return {token_loss, loss, distillation};
}

Tensor loss_weights(const std::optional<Tensor>& grad_token_loss, const std::optional<Tensor>& grad_loss,
                    const Tensor& temperature, const Tensor& mask, const Tensor& k,
                    const std::optional<Tensor>& cross_entropy, const std::optional<Tensor>& ce_mask,
                    const std::optional<Tensor>& n, double ce_weight) {
  const ScalarType type = temperature.scalar_type();
  const bool with_ce = cross_entropy.has_value();
  Tensor out = torch::stable::new_empty(temperature, {with_ce ? 2 : 1, mask.size(0), mask.size(1)});
  const auto of_token = numbers(grad_token_loss, type), of_loss = numbers(grad_loss, type);
  const auto ce = numbers(cross_entropy, type);
  const Tensor tau = numbers(temperature, type), selected = torch::stable::contiguous(mask);
  const Tensor valid = torch::stable::contiguous(ce_mask.has_value() ? *ce_mask : mask);
  char* const first = static_cast<char*>(out.data_ptr());
  adakd::loss_weights({is_double(temperature), mask.numel(), data_of(of_token), data_of(of_loss), tau.data_ptr(),
                       mask_of(selected), data_of(ce), mask_of(valid), value_of(n, 1.0), value_of(k), ce_weight, first,
                       first + mask.numel() * out.element_size()});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adakd, CPU, library) {
  if (adakd::kernels() == nullptr) return;  // ADAKD_ISA is wrong: the operators stay in plain torch
  library.impl("token_stats", TORCH_BOX(&token_stats));
  library.impl("token_divergence", TORCH_BOX(&token_divergence));
  library.impl("choose_tokens", TORCH_BOX(&choose_tokens));
  library.impl("focus_step_", TORCH_BOX(&focus_step_));
  library.impl("token_cross_entropy", TORCH_BOX(&token_cross_entropy));
  library.impl("spread_statistics", TORCH_BOX(&spread_statistics));
  library.impl("loss_sums", TORCH_BOX(&loss_sums));
  library.impl("loss_weights", TORCH_BOX(&loss_weights));
  library.impl("token_kl", TORCH_BOX(&token_kl));
  library.impl("token_terms", TORCH_BOX(&token_terms));
  library.impl("token_divergence_backward", TORCH_BOX(&token_divergence_backward<false>));
  library.impl("token_divergence_backward_", TORCH_BOX(&token_divergence_backward<true>));
  library.impl("token_divergence_with_gradient", TORCH_BOX(&token_divergence_with_gradient<false>));
  library.impl("token_divergence_with_gradient_", TORCH_BOX(&token_divergence_with_gradient<true>));
}

// For adakd_kernels/ops/native.py and the tests, through ctypes.
#define ADAKD_EXPORT __attribute__((visibility("default")))
extern "C" {
// The instruction set in use; null where ADAKD_ISA names one that this processor lacks.
ADAKD_EXPORT const char* adakd_isa() { return adakd::kernels() == nullptr ? nullptr : adakd::kernels()->isa; }
ADAKD_EXPORT const char* adakd_instruction_sets() { return adakd::instruction_sets(); }
// The names of the divergences that it was built with, each with a blank after it.
ADAKD_EXPORT const char* adakd_divergences() {
#define ADAKD_NAME_AND_BLANK(Class, name) name " "
  return ADAKD_DIVERGENCES(ADAKD_NAME_AND_BLANK);
#undef ADAKD_NAME_AND_BLANK
}
ADAKD_EXPORT void adakd_exp2(const float* x, float* y, int64_t n) { kernels().exp2(x, y, n); }
ADAKD_EXPORT void adakd_mass(const float* x, float* y, int64_t n) { kernels().mass(x, y, n); }
ADAKD_EXPORT void adakd_log2(const float* x, float* y, int64_t n) { kernels().log2(x, y, n); }
}
