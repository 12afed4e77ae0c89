// The kernels for AVX-512 (F, BW, DQ, VL).
#define ADAKD_ISA avx512
#include "isa.h"
