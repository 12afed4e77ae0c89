// The kernels for what the compiler targets by default: SSE2 on x86-64, NEON on ARM.
#define ADAKD_ISA portable
#include "isa.h"
