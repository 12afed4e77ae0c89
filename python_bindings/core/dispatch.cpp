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

const Kernels* choose() {
  const char* const wanted = std::getenv("ADAKD_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  const auto asked_for = [&](const Kernels& k) { return any || std::strcmp(wanted, k.isa) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && asked_for(avx512::table)) return &avx512::table;
  if (has_avx2 && asked_for(avx2::table)) return &avx2::table;
#endif
  return asked_for(portable::table) ? &portable::table : nullptr;
}

}  // namespace

const Kernels* kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

}  // namespace adakd
