// Chooses the instruction set when the first kernel is asked for.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace adakd {
#if defined(__x86_64__)
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
#endif
namespace portable {
extern const Kernels table;
}

namespace {

bool has_avx2() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

bool is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

const Kernels* choose() {
  const char* const wanted = std::getenv("ADAKD_ISA");
  const auto taken = [wanted](const Kernels& k) {
    return wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, k.isa) == 0;
  };
#if defined(__x86_64__)
  if (has_avx512() && taken(avx512::table)) return &avx512::table;
  if (has_avx2() && taken(avx2::table)) return &avx2::table;
#endif
  return taken(portable::table) ? &portable::table : nullptr;
}

}  // namespace

const int prefetch_distance = is_intel() ? 2048 : 0;

const Kernels* kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

const char* instruction_sets() {
  return has_avx512() ? "avx512 avx2 portable" : has_avx2() ? "avx2 portable" : "portable";
}

}  // namespace adakd
