// The kernels for AVX2 with FMA and F16C.
#define ADAKD_ISA avx2
#include "isa.h"
