#define ADAKD_ISA portable
#include "isa.h"
