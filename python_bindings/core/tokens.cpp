// What tokens.h declares.
#include "tokens.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#define ADAKD_ISA portable
#include "rows.h"

namespace adakd {
namespace {

template <class S> S within(S x, S low, S high) { return x < low ? low : x > high ? high : x; }  // NaN stays

template <class S> void choose(const ChoiceCall& call) {
  const S* const difficulty = static_cast<const S*>(call.difficulty);
  S* const temperature = static_cast<S*>(call.temperature);
  std::vector<int64_t> order;
  order.reserve(call.tokens);
  for (int64_t i = 0; i < call.tokens; ++i) {
    call.selected[i] = false;
    if (call.valid[i]) order.push_back(i);
  }
  // NaN is the hardest, so that it is seen; ties go to the lower index.
  const auto harder = [difficulty](int64_t a, int64_t b) {
    const S x = difficulty[a], y = difficulty[b];
    if (x > y || y > x) return x > y;
    const bool lost_x = x != x, lost_y = y != y;
    return lost_x != lost_y ? lost_x : a < b;
  };
  const int64_t n = static_cast<int64_t>(order.size());
  double k = std::floor(call.focus_ratio * static_cast<double>(n));
  if (!(k > 1.0)) k = 1.0;
  const int64_t taken = k < static_cast<double>(n) ? static_cast<int64_t>(k) : n;
  if (taken < n) std::nth_element(order.begin(), order.begin() + taken, order.end(), harder);
  for (int64_t i = 0; i < taken; ++i) call.selected[order[i]] = true;
  S median = 0;
  if (taken > 0) {
    // The lower median of `taken` numbers stands at place taken / 2 of their descending order.
    const auto middle = order.begin() + taken / 2;
    std::nth_element(order.begin(), middle, order.begin() + taken, harder);
    median = difficulty[*middle];
  }

  double items = static_cast<double>(n > 1 ? n : 1);
  if (call.items_given) {
    items = call.num_items == 0.0 ? 1.0 : call.num_items;
    k = items * call.focus_ratio;
  }
  *static_cast<S*>(call.n) = static_cast<S>(items);
  *static_cast<S*>(call.k) = static_cast<S>(k);

  using Limits = std::numeric_limits<S>;
  const S large = Limits::max() / 4, lowest = std::sqrt(Limits::min()), highest = std::sqrt(Limits::max());
  const S scale = static_cast<S>(within<double>(call.scale, -Limits::max(), Limits::max()));
  const S base = static_cast<S>(within<double>(call.base, Limits::min(), Limits::max()));
  const S m = within<S>(median, 0, large);
  for (int64_t i = 0; i < call.tokens; ++i) {
    S tau = base;
    if (call.valid[i]) {
      const S s = within<S>(difficulty[i], 0, large), total = s + m;
      tau = base * std::exp(-scale * (total == 0 ? S(0) : (s - m) / total));
    }
    temperature[i] = within<S>(tau, lowest, highest);
  }
}

template <class S> void cross_entropy(const CrossEntropyCall& call) {
  for (int64_t i = 0; i < call.count; ++i) {
    S ce = 0;
    if (call.mask[i]) {
      const int64_t label = call.labels[i];
      const S max = static_cast<const S*>(call.max_s)[i], sum = static_cast<const S*>(call.sum_s)[i];
      ce = std::numeric_limits<S>::quiet_NaN();
      if (label >= 0 && label < call.rows.vocab) {
        const auto row = portable::row_of(call.rows.student, i, call.rows.tokens);
        ce = max - static_cast<S>(portable::entry_of(row, label)) + std::log(sum);
      }
    }
    static_cast<S*>(call.out)[i] = ce;
  }
}

template <class S> void spread(const SpreadCall& call) {
  const S* const difficulty = static_cast<const S*>(call.difficulty);
  const S *const sum_s = static_cast<const S*>(call.sum_s), *const sum_t = static_cast<const S*>(call.sum_t);
  S *const everywhere = static_cast<S*>(call.everywhere), *const ce = static_cast<S*>(call.cross_entropy);
  std::fill_n(everywhere, call.batch, S(0));
  std::fill_n(call.valid, call.batch, false);
  for (int64_t i = 0; i < call.count; ++i) {
    const bool valid = sum_s[i] != 0 && sum_t[i] != 0;  // a sum of NaN is not 0
    everywhere[call.positions[i]] = difficulty[i];
    call.valid[call.positions[i]] = call.valid_here[i] = valid;
    if (call.labels == nullptr) continue;
    const bool known = call.labels[i] >= 0 && call.labels[i] < call.vocab;
    const S logit = static_cast<const S*>(call.label_logits)[i], max = static_cast<const S*>(call.max_s)[i];
    ce[i] = !valid ? S(0) : known ? max - logit + std::log(sum_s[i]) : std::numeric_limits<S>::quiet_NaN();
  }
}

template <class S> void sums(const SumsCall& call) {
  const S *const d = static_cast<const S*>(call.d), *const tau = static_cast<const S*>(call.temperature);
  const S* const ce = static_cast<const S*>(call.cross_entropy);
  S* const out = static_cast<S*>(call.token_loss);
  std::fill_n(out, call.batch, S(0));
  double total = 0.0, total_ce = 0.0;
  for (int64_t i = 0; i < call.tokens; ++i) {
    const S token_loss = tau[i] * tau[i] * d[i];
    out[call.positions == nullptr ? i : call.positions[i]] = token_loss;
    total += token_loss;
    if (ce != nullptr) total_ce += ce[i];
  }
  const double distillation = total / call.k;
  *call.distillation = distillation;
  const double a = call.ce_weight;
  *static_cast<S*>(call.loss) =
      static_cast<S>(ce == nullptr ? distillation : (1.0 - a) * distillation + a * (total_ce / call.n));
}

template <class S> void weights(const WeightsCall& call) {
  const S* const of_token = static_cast<const S*>(call.grad_token_loss);
  const S* const tau = static_cast<const S*>(call.temperature);
  const S* const ce = static_cast<const S*>(call.cross_entropy);
  const S without = of_token == nullptr ? S(1) : S(0);
  const S of_loss = call.grad_loss == nullptr ? without : *static_cast<const S*>(call.grad_loss);
  const S a = ce == nullptr ? S(0) : static_cast<S>(call.ce_weight);
  const S of_d = of_loss * (1 - a) / static_cast<S>(call.k), of_ce = of_loss * a / static_cast<S>(call.n);
  for (int64_t i = 0; i < call.tokens; ++i) {
    S weight = 0;
    if (call.mask[i]) weight = (of_token == nullptr ? of_d : of_token[i] + of_d) * (tau[i] * tau[i]);
    if (ce != nullptr) {
      S weight_ce = call.ce_mask[i] ? of_ce : S(0);
      // The weight of D carries the NaN of a label beyond the vocabulary: it reaches all common entries, and no other.
      if (ce[i] != ce[i] && weight_ce != 0) {
        weight = std::numeric_limits<S>::quiet_NaN();
        weight_ce = 0;
      }
      static_cast<S*>(call.of_ce)[i] = weight_ce;
    }
    static_cast<S*>(call.weight)[i] = weight;
  }
}

}  // namespace

void choose_tokens(const ChoiceCall& call) { call.in_double ? choose<double>(call) : choose<float>(call); }
void token_cross_entropy(const CrossEntropyCall& call) {
  call.in_double ? cross_entropy<double>(call) : cross_entropy<float>(call);
}
void spread_statistics(const SpreadCall& call) { call.in_double ? spread<double>(call) : spread<float>(call); }
void loss_sums(const SumsCall& call) { call.in_double ? sums<double>(call) : sums<float>(call); }
void loss_weights(const WeightsCall& call) { call.in_double ? weights<double>(call) : weights<float>(call); }

void focus_step(double loss, const FocusState& state, int64_t warmup_steps, double beta, double epsilon, double delta,
                double min_ratio) {
  if (!std::isfinite(loss)) return;  // a skipped step of a gradient scaler
  const double ema = *state.steps == 0 ? loss : beta * *state.ema + (1.0 - beta) * loss;
  const int64_t steps = ++*state.steps;
  double ratio = *state.ratio;
  if (steps > warmup_steps) {
    if (ema < *state.reference * (1.0 - epsilon)) {
      ratio = std::max(min_ratio, ratio * (1.0 - delta));
    } else if (ema > *state.reference * (1.0 + epsilon)) {
      ratio = std::min(1.0, ratio * (1.0 + delta));
    }
  }
  if (steps == warmup_steps || ratio != *state.ratio) *state.reference = ema;
  *state.ratio = ratio;
  *state.ema = ema;
}

}  // namespace adakd
