// What the kernels compute and how they are called: plain C++, no torch, no instruction set.
//
// A call describes a batch. A kernel computes token n of it, so that the caller decides on the threads. The results of
// a token depend neither on the other tokens nor on the thread.
#pragma once

#include <cstdint>

#include "divergences.h"

namespace adakd {

enum class Type { kFloat, kBf16, kHalf, kDouble };

// (B, L, V) logits; strides in entries, the vocabulary contiguous.
struct Logits {
  void* data;
  Type type;
  int64_t stride_b, stride_l;
};

struct Rows {
  Logits student, teacher;
  int64_t tokens;  // L
  int64_t vocab;   // number of common entries, the first of both rows
};

// Per-token numbers are (B·L,) arrays of the accumulation type: double where either side's logits are, else float. A
// normaliser is the maximum of a row and Σ exp((z - max)/τ).
struct Normalizers {
  void *max_s, *sum_s, *max_t, *sum_t;
};

struct StatsCall {
  Rows rows;
  const bool* mask;  // (B·L,) tokens to compute; others get the results of ops/token_stats.py, and are not read
  void* distance;    // s² of equation (2)
  Normalizers out;   // at temperature 1
};

struct DivergenceCall {
  Rows rows;
  Divergence divergence;
  double alpha, beta;
  const void* temperature;
  const bool* mask;
  void *d, *sum_g;  // D and Σg of equation (10)
  int64_t* peak;    // the student's most likely entry, or -1
  void* peak_grad;  // τ·∂D/∂zˢ there
  Normalizers out;  // at temperature τ
};

struct KlCall {
  Rows rows;
  const void* temperature;
  const bool* mask;
  void *forward, *kept, *reverse, *lost;  // KL(p‖q), Σ p over the finite entries; KL(q‖p), Σ q over the others
  int64_t* peak;                          // as in DivergenceCall
  void *forward_grad, *reverse_grad;      // τ·∂D/∂zˢ there, of either
  Normalizers out;                        // at temperature τ
};

struct TermsCall {
  Rows rows;  // a part of the vocabulary
  Divergence divergence;
  double alpha, beta;
  const void* temperature;
  const bool* mask;
  Normalizers in;        // of the whole rows, at temperature τ
  const void* constant;  // c
  const int64_t* peak;   // the entry that is left out, or -1
  void *f, *g;           // Σf and Σ (g + c·q)
};

struct GradientCall {
  Rows rows;
  Divergence divergence;
  double alpha, beta;
  Logits grad;            // of the student's type; may be the student's logits
  int64_t student_vocab;  // entries from `vocab` on get gradient 0
  const void *temperature, *weight, *sum_g;  // weight: gradient of the loss in D
  Normalizers in;                            // as the forward gave them, like sum_g, peak and peak_grad
  const int64_t* peak;
  const void* peak_grad;
  const int64_t* labels;  // null: no cross-entropy
  // Gradient of the loss in the cross-entropy; the student's normaliser at temperature 1.
  const void *ce_weight, *ce_max, *ce_sum;
};

// Divergence and gradient of a token in one go. The gradient takes the results that `divergence` puts in its arrays.
struct WithGradientCall {
  DivergenceCall divergence;
  GradientCall gradient;
};

struct Kernels {
  const char* isa;
  void (*token_stats)(const StatsCall&, int64_t n);
  void (*token_divergence)(const DivergenceCall&, int64_t n);
  void (*token_kl)(const KlCall&, int64_t n);
  void (*token_terms)(const TermsCall&, int64_t n);
  void (*token_divergence_backward)(const GradientCall&, int64_t n);
  // scratch: room for `vocab` floats, which a divergence of two sweeps uses where the logits are not fp64; or null.
  void (*token_divergence_with_gradient)(const WithGradientCall&, int64_t n, float* scratch);
  bool (*takes_two_sweeps)(Divergence);  // whether token_terms has the divergence
  void (*exp2)(const float* x, float* y, int64_t n);
  void (*mass)(const float* x, float* y, int64_t n);
  void (*log2)(const float* x, float* y, int64_t n);
};

// How many bytes ahead of a load the kernels prefetch: 0 except on Intel, where they would otherwise wait for memory
// most of the time. On AMD they are faster without (docs/cpu-kernels.md).
extern const int prefetch_distance;

// The kernels for this processor, or for the instruction set that the environment variable ADAKD_ISA names: avx512,
// avx2 or portable. Null where this processor or this build lacks the one that it names.
const Kernels* kernels();

// The instruction sets that this processor and this build have, the widest first.
const char* instruction_sets();

}  // namespace adakd
