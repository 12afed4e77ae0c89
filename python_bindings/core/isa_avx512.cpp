#define ADAKD_ISA avx512
#include "isa.h"
