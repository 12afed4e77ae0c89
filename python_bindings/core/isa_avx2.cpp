#define ADAKD_ISA avx2
#include "isa.h"
