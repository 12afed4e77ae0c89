// Chooses the kernels' instruction set, when they are first asked for.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace adakd {
#if defined(ADAKD_HAS_AVX512)
namespace avx512 {
extern const Kernels table;
}
#endif
#if defined(ADAKD_HAS_AVX2)
namespace avx2 {
extern const Kernels table;
}
#endif
namespace portable {
extern const Kernels table;
}

namespace {

// Whether this build and this processor have an instruction set. __builtin_cpu_init has to come first, because
// prefetch_distance asks for the processor while the library is being loaded.
bool has_avx2() {
#if defined(ADAKD_HAS_AVX2)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(ADAKD_HAS_AVX512)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
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
  // The widest first.
#if defined(ADAKD_HAS_AVX512)
  if (has_avx512() && taken(avx512::table)) return &avx512::table;
#endif
#if defined(ADAKD_HAS_AVX2)
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
  if (has_avx512() && has_avx2()) return "avx512 avx2 portable";
  return has_avx512() ? "avx512 portable" : has_avx2() ? "avx2 portable" : "portable";
}

}  // namespace adakd
