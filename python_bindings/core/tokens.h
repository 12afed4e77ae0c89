// Per-token numbers between the kernels over the vocabulary: which tokens are selected and at which temperature, their
// cross-entropy, the sums of the loss, and the weights of its gradient. One thread computes them in a fixed order. The
// equations are those of docs/maths.md; adakd_kernels/adaptive.py and ops/loss_sums.py hold the reference.
#pragma once

#include "kernels.h"

namespace adakd {

// Equations (3) to (6). Numbers of tokens are of the accumulation type, double or float.
struct ChoiceCall {
  bool in_double;
  int64_t tokens;
  const void* difficulty;
  const bool* valid;
  double focus_ratio;
  bool items_given;
  double num_items, scale, base;  // scale: c
  bool* selected;
  void *temperature, *n, *k;
};
void choose_tokens(const ChoiceCall& call);

// Equations (8) and (9) over the state of LATF.
struct FocusState {
  double *ratio, *ema, *reference;
  int64_t* steps;
};
void focus_step(double loss, const FocusState& state, int64_t warmup_steps, double beta, double epsilon, double delta,
                double min_ratio);

struct CrossEntropyCall {
  bool in_double;
  Rows rows;
  int64_t count;  // of all tokens
  const int64_t* labels;
  const bool* mask;
  const void *max_s, *sum_s;
  void* out;
};
void token_cross_entropy(const CrossEntropyCall& call);

// Statistics of the labelled tokens (`count`), as statistics of all tokens of their batch, and their cross-entropy.
struct SpreadCall {
  bool in_double;
  int64_t count, batch;
  const void *difficulty, *max_s, *sum_s, *sum_t;
  const int64_t* positions;  // of the tokens in the batch
  const void* label_logits;  // null where the loss has no cross-entropy
  const int64_t* labels;
  int64_t vocab;
  void* everywhere;  // difficulty
  bool *valid, *valid_here;
  void* cross_entropy;
};
void spread_statistics(const SpreadCall& call);

struct SumsCall {
  bool in_double;
  int64_t tokens;
  const int64_t* positions;  // of the tokens in a batch of more, or null; then the batch is 0
  int64_t batch;
  const void *d, *temperature, *cross_entropy;  // cross_entropy: null where the loss has none
  double n, k, ce_weight;
  void *token_loss, *loss;
  double* distillation;
};
void loss_sums(const SumsCall& call);

struct WeightsCall {
  bool in_double;
  int64_t tokens;
  const void *grad_token_loss, *grad_loss;  // null: 0; both null: 1 of the loss
  const void* temperature;
  const bool* mask;
  const void* cross_entropy;  // null: none, as the next
  const bool* ce_mask;
  double n, k, ce_weight;
  void *weight, *of_ce;
};
void loss_weights(const WeightsCall& call);

}  // namespace adakd
