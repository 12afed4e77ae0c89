// What the kernels compute and how they are called: plain C++, no torch, no instruction set.
//
// A call describes a batch; a kernel computes one token of it, so that whoever calls decides on the threads. Results of a
// token do not depend on the others, nor on the thread.
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
  int64_t vocab;   // entries that both rows have
};

// Per-token numbers are (B·L,) arrays of the accumulation type: double where either side's logits are, else float.
struct Normalizers {
  void *max_s, *sum_s, *max_t, *sum_t;
};

struct StatsCall {
  Rows rows;
  const bool* mask;
  void* hellinger;  // s² of equation (2)
  Normalizers out;
};

struct DivergenceCall {
  Rows rows;
  Divergence divergence;
  double alpha, beta;
  const void* temperature;
  const bool* mask;
  void *d, *sum_g;
  int64_t* peak;
  void* peak_grad;
  Normalizers out;
};

struct GradientCall {
  Rows rows;
  Divergence divergence;
  double alpha, beta;
  Logits grad;            // of the student's type; may be the student's logits
  int64_t student_vocab;  // entries from `vocab` on get gradient 0
  const void *temperature, *weight, *sum_g;
  Normalizers in;
  const int64_t* peak;
  const void* peak_grad;
  const int64_t* labels;  // null: no cross-entropy
  const void *ce_weight, *ce_max, *ce_sum;
};

struct Kernels {
  const char* isa;
  void (*token_stats)(const StatsCall&, int64_t n);
  void (*token_divergence)(const DivergenceCall&, int64_t n);
  void (*token_divergence_backward)(const GradientCall&, int64_t n);
  void (*exp2)(const float* x, float* y, int64_t n);
  void (*log2)(const float* x, float* y, int64_t n);
};

// How many bytes ahead of a load the kernels ask for memory: 0 except on Intel, where they would otherwise wait for memory
// most of the time. On AMD they are faster without (docs/cpu-kernels.md).
extern const int prefetch_distance;

// The kernels for this processor, or for the instruction set that the environment variable ADAKD_ISA names: avx512, avx2
// or portable. Null where the variable names none that this processor and this build have.
const Kernels* kernels();

// The instruction sets that this processor and this build have, the widest first.
const char* instruction_sets();

}  // namespace adakd
